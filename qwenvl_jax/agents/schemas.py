"""The schemas of the tools as the models were trained on them: the official wording, word for word.

Source: agent_function_call.py in the cookbooks of Qwen2.5-VL and Qwen3-VL, image_zoom_in_tool of Qwen-Agent, and the
form that Qwen-Agent gives them in the prompt ("name_for_human", "args_format").
"""

from qwenvl_jax.answers.boxes import Sizes
from qwenvl_jax.errors import InputError, shown

_XY = "(x, y): The x (pixels from the left edge) and y (pixels from the top edge) coordinates to move the mouse to."
_STATUS = {
    "description": "The status of the task. Required only by `action=terminate`.",
    "type": "string",
    "enum": ["success", "failure"],
}
_AT = " at a specified (x, y) pixel coordinate on the screen"

_COMPUTER = """
Use a mouse and keyboard to interact with a computer, and take screenshots.
* This is an interface to a desktop GUI. You do not have access to a terminal or applications menu. You must click on \
desktop icons to start applications.
* Some applications may take time to start or process actions, so you may need to wait and take successive screenshots \
to see the results of your actions. E.g. if you click on Firefox and a window doesn't open, try wait and taking \
another screenshot.
* The screen's resolution is {}x{}.
* Whenever you intend to move the cursor to click on an element like an icon, you should consult a screenshot to \
determine the coordinates of the element before moving the cursor.
* If you tried clicking on a program or link but it failed to load, even after waiting, try adjusting your cursor \
position so that the tip of the cursor visually falls on the element that you want to click.
* Make sure to click any buttons, links, icons, etc with the cursor tip in the center of the element. Don't click \
boxes on their edges{}.
""".strip()
_COMPUTER_ACTIONS = {
    "key": "Performs key down presses on the arguments passed in order, then performs key releases in reverse order.",
    "type": "Type a string of text on the keyboard.",
    "mouse_move": "Move the cursor to a specified (x, y) pixel coordinate on the screen.",
    "left_click": "Click the left mouse button.",
    "left_click_drag": "Click and drag the cursor to a specified (x, y) pixel coordinate on the screen.",
    "right_click": "Click the right mouse button.",
    "middle_click": "Click the middle mouse button.",
    "double_click": "Double-click the left mouse button.",
    "triple_click": f"Triple-click the left mouse button{_AT} "
    "(simulated as double-click since it's the closest action).",
    "scroll": "Performs a scroll of the mouse scroll wheel.",
    "hscroll": "Performs a horizontal scroll (mapped to regular scroll).",
    "wait": "Wait specified seconds for the change to happen.",
    "terminate": "Terminate the current task and report its completion status.",
    "answer": "Answer a question.",
}
_NEWER = ("triple_click", "hscroll", "answer")  # Qwen3-VL's

_PHONE = """
Use a touchscreen to interact with a mobile device, and take screenshots.
* This is an interface to a mobile device with touchscreen. You can perform actions like clicking, typing, swiping, etc.
* Some applications may take time to start or process actions, so you may need to wait and take successive screenshots \
to see the results of your actions.
* The screen's resolution is {}x{}.
* Make sure to click any buttons, links, icons, etc with the cursor tip in the center of the element. Don't click \
boxes on their edges unless asked.
""".strip()
_PHONE_ACTIONS = {
    "key": "Perform a key event on the mobile device.\n    - This supports adb's `keyevent` syntax.\n"
    '    - Examples: "volume_up", "volume_down", "power", "camera", "clear".',
    "click": "Click the point on the screen with coordinate (x, y).",
    "long_press": "Press the point on the screen with coordinate (x, y) for specified seconds.",
    "swipe": "Swipe from the starting point with coordinate (x, y) to the end point with coordinates2 (x2, y2).",
    "type": "Input the specified text into the activated input box.",
    "system_button": "Press the system button.",
    "open": "Open an app on the device.",
    "wait": "Wait specified seconds for the change to happen.",
    "terminate": "Terminate the current task and report its completion status.",
}
_PHONE_BUTTON = (
    "Back means returning to the previous interface, Home means returning to the desktop, Menu means opening the "
    "application background menu, and Enter means pressing the enter. Required only by `action=system_button`"
)

_ZOOM = (
    "Zoom in on a specific region of an image by cropping it based on a bounding box (bbox) and an optional object "
    "label"
)
_ZOOM_BOX = (
    "The bounding box of the region to zoom in, as [x1, y1, x2, y2], where (x1, y1) is the top-left corner and "
    "(x2, y2) is the bottom-right corner"
)


def schema(tool: str, screen: Sizes, coordinates: str = "resized") -> dict:
    """A tool's description in OpenAI's form, for `tools=` of a prompt.

    screen: the screenshot's sizes; the model is told the size in its `coordinates`, one of `answers.boxes.COORDINATES`.
    Raises InputError for an unknown tool.
    """
    width, height = screen.of(coordinates)
    newer = coordinates == "thousandths"
    if tool == "computer_use":
        actions = {name: _line(line, newer) for name, line in _COMPUTER_ACTIONS.items() if newer or name not in _NEWER}
        text = _COMPUTER.format(width, height, "" if newer else " unless asked")
        return _function(tool, text, _action(actions) | _computer_arguments(newer), ["action"])
    if tool == "mobile_use":
        return _function(tool, _PHONE.format(width, height), _action(_PHONE_ACTIONS) | _phone_arguments(), ["action"])
    if tool == "image_zoom_in_tool":
        box = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4, "description": _ZOOM_BOX}
        label = {"type": "string", "description": "The name or label of the object in the specified bounding box"}
        index = {"type": "number", "description": "The index of the zoomed-in image (starting from 0)"}
        parameters = {"bbox_2d": box, "label": label, "img_idx": index}
        return _function(tool, _ZOOM, parameters, list(parameters))
    raise InputError(f"there is no tool {shown(tool)}; the tools are computer_use, mobile_use, image_zoom_in_tool")


def _function(name: str, description: str, properties: dict, required: list[str]) -> dict:
    parameters = {"properties": properties, "required": required, "type": "object"}
    if name == "image_zoom_in_tool":
        parameters = {"type": "object", "properties": properties, "required": required}
    function = {"name_for_human": name, "name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function | {"args_format": "Format the arguments as a JSON object."}}


def _line(line: str, newer: bool) -> str:
    clicks = line.startswith(("Click the ", "Double-click"))
    return line.replace(" button.", f" button{_AT}.") if newer and clicks else line


def _action(actions: dict[str, str]) -> dict:
    lines = "\n".join(f"* `{name}`: {line}" for name, line in actions.items())
    text = f"The action to perform. The available actions are:\n{lines}"
    return {"action": {"description": text, "enum": list(actions), "type": "string"}}


def _computer_arguments(newer: bool) -> dict:
    only = "Required only by `action="
    where = "" if newer else f" {only}mouse_move` and `action=left_click_drag`."
    scrolled = "The amount of scrolling to perform. Positive values scroll up, negative values scroll down. "
    scrolled += f"{only}scroll`" + " and `action=hscroll`" * newer
    return {
        "keys": {"description": f"{only}key`.", "type": "array"},
        "text": {"description": f"{only}type`" + " and `action=answer`" * newer + ".", "type": "string"},
        "coordinate": {"description": _XY + where, "type": "array"},
        "pixels": {"description": f"{scrolled}.", "type": "number"},
        "time": {"description": f"The seconds to wait. {only}wait`.", "type": "number"},
        "status": _STATUS,
    }


def _phone_arguments() -> dict:
    only = "Required only by `action="
    return {
        "coordinate": {
            "description": f"{_XY} {only}click`, `action=long_press`, and `action=swipe`.",
            "type": "array",
        },
        "coordinate2": {"description": f"{_XY} {only}swipe`.", "type": "array"},
        "text": {"description": f"{only}key`, `action=type`, and `action=open`.", "type": "string"},
        "time": {"description": f"The seconds to wait. {only}long_press` and `action=wait`.", "type": "number"},
        "button": {"description": _PHONE_BUTTON, "enum": ["Back", "Home", "Menu", "Enter"], "type": "string"},
        "status": _STATUS,
    }
