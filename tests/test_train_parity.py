"""Every tensor's gradient and twenty AdamW steps equal torch's in float32 (transformers 4.51.3)."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from qwenvl_convert.names import tensor_names
from test_losses import small_config
from test_parity import reference
from tiny import FAMILIES, clip, picture, sample, train_batch, with_text

from qwenvl_jax.params.specs import specs
from qwenvl_jax.train.losses import sft_loss
from qwenvl_jax.train.step import init_state, make_optimizer, make_schedule, make_step

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LIMIT = 1e-4
STEPS = 20


def conversations(config):
    """Pictures, a clip and text, alone and together."""
    rng = np.random.default_rng(11)
    pic, vid = (lambda *a: picture(rng, config, *a)), (lambda *a: clip(rng, config, *a))
    return [
        sample(rng, config, 3, pic(10, 14), 12),
        sample(rng, config, 14),
        sample(rng, config, 2, vid(3, 6, 8, 0.83), 4, pic(4, 8), 9),
    ]


def torch_loss(model, inputs, labels):
    model.rope_deltas = None  # the reference keeps them across calls
    return model(**inputs, labels=labels, use_cache=False).loss


def torch_labels(samples, batch):
    """-100 except at weights of 1. transformers shifts labels by one; our targets are shifted."""
    import torch

    labels = torch.full((len(samples), max(len(s.tokens) for s in samples)), -100)
    for b, s in enumerate(samples):
        n = len(s.tokens)
        learnt = batch.weights[b, : n - 1] == 1
        labels[b, 1:n][torch.tensor(learnt)] = torch.tensor(s.tokens[1:][learnt], dtype=torch.long)
    assert (labels != -100).sum() == batch.weights.sum()
    return labels


def as_ours(config, tensors):
    """Torch tensors by name → arrays by our parameters' paths."""
    out = {}
    for path, names in tensor_names(config).items():
        leaves = [tensors[name].detach().numpy() for name in names]
        if path == "vision/patch_embed/kernel":
            leaves = [w.reshape(len(w), -1) for w in leaves]
        spec = specs(config)[path]
        leaves = [w.T if spec.transposed else w for w in leaves]
        out[path] = np.stack(leaves) if spec.stacked else leaves[0]
    return out


def assert_gradients(declared, ours, theirs):
    """Compares tensor by tensor: a stack of layers is one tensor per layer."""
    assert ours.keys() == theirs.keys()
    errors = {}
    for path, want in theirs.items():
        for l in range(len(want)) if declared[path].stacked else [...]:
            a, b = np.asarray(ours[path][l], np.float64), want[l].astype(np.float64)
            assert np.abs(b).max() > 0
            errors[path, l] = np.abs(a - b).max() / np.abs(b).max()
    worst = max(errors, key=errors.get)
    assert errors[worst] <= LIMIT, f"{worst}: {errors[worst]:.1e}"


@pytest.mark.parametrize("family, tied", [(FAMILIES[0], True), (FAMILIES[1], False), (FAMILIES[1], True)])
def test_every_gradient_and_twenty_steps(family, tied, tmp_path):
    import torch
    from qwenvl_convert.parity import reference_inputs

    config = with_text(small_config(family), tie_word_embeddings=tied)
    model, params = reference(config, tmp_path)
    samples = conversations(config)
    inputs = reference_inputs(samples, config)
    labels = torch_labels(samples, train_batch(config, [[s] for s in samples]))
    batch = train_batch(config, [samples[:2], samples[2:]])  # packed here, one conversation per row there

    declared = specs(config)
    rate, decay, clip_norm = make_schedule(2e-3, "cosine", warmup=3, total=STEPS), 0.1, 1.0
    keep = optax.GradientTransformation(lambda params: params, lambda grads, *_: (grads, grads))
    optimizer = optax.chain(keep, make_optimizer(declared, rate, weight_decay=decay, clip=clip_norm))
    step = make_step(declared, partial(sft_loss, config, chunk=16), optimizer, lambda path: True)
    state = init_state(declared, params, optimizer, lambda path: True)
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if name.endswith("bias") or p.ndim == 1]
    decayed = [p for name, p in named.items() if not (name.endswith("bias") or p.ndim == 1)]
    adamw = torch.optim.AdamW([{"params": decayed, "weight_decay": decay}, {"params": plain, "weight_decay": 0.0}])
    batch = jax.tree.map(lambda a: np.asarray(a)[None], batch)
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, batch)
        for g in adamw.param_groups:
            g["lr"] = float(rate(i))
        adamw.zero_grad()
        theirs = torch_loss(model, inputs, labels)
        theirs.backward()
        if i == 0:
            assert_gradients(declared, state.opt_state[0], as_ours(config, {name: p.grad for name, p in named.items()}))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        adamw.step()
        losses.append((float(metrics["loss"]), theirs.item()))
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-3)
    assert losses[-1][1] < 0.5 * losses[0][1]
    assert max(abs(a - b) / b for a, b in losses) <= LIMIT, losses
