"""The protocol of proof: what must hold for every adapter and every form of model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import tokenprune
from tests.helpers.outputs import assert_close
from tests.helpers.tolerances import IDENTITY, MASK_EQUALS_GATHER
from tests.helpers.zoo import KEEP_RATIO, STAGES, Case, every_model, hook_counts
from tokenprune import Candidates, Plan, Scorer, ScorerContext
from tokenprune.tokens import output_tokens


class Ranked(Scorer):
    """Keeps the same known positions, others for every image: scores fall from a position on."""

    def forward(self, candidates: Candidates) -> Tensor:
        batch = candidates.patches.shape[0]
        positions = torch.arange(candidates.num_patches).expand(batch, -1)
        scores = -((positions - 5 * torch.arange(batch)[:, None]) % candidates.num_patches).float()
        return scores if candidates.indices is None else scores.gather(1, candidates.indices)


def ranked(context: ScorerContext) -> Ranked:
    return Ranked()


def expected_positions(case: Case, batch: int, kept: int) -> Tensor:
    start = 5 * torch.arange(batch)[:, None]
    return ((start + torch.arange(kept)) % case.num_patches).sort(dim=1).values


@every_model
@torch.no_grad()
def test_nothing_pruned_is_the_dense_model(case: Case) -> None:
    model, images = case.model(), case.images()
    before = case.run(model, images)
    tokenprune.sparsify(model, STAGES, 1.0)
    assert_close(case.run(model, images), before, IDENTITY)
    model.train()
    model.tokenprune.execution = "mask"
    model.eval()
    assert_close(case.run(model, images), before, IDENTITY)
    model.tokenprune.keep_ratio = KEEP_RATIO
    with tokenprune.dense(model):
        assert_close(case.run(model, images), before, IDENTITY)
        assert model.tokenprune.trace is None


@every_model
@pytest.mark.parametrize("dtype", MASK_EQUALS_GATHER, ids=str)
@torch.no_grad()
def test_mask_equals_gather(case: Case, dtype: torch.dtype) -> None:
    model, images = case.sparsified(dtype), case.images(dtype=dtype)
    gathered = case.run(model, images)
    kept = model.tokenprune.trace.keep
    model.tokenprune.execution = "mask"
    masked = case.run(model, images)
    assert all(torch.equal(one, other) for one, other in zip(model.tokenprune.trace.keep, kept, strict=True))
    assert_close(masked, gathered, MASK_EQUALS_GATHER[dtype])


@every_model
@torch.no_grad()
def test_pruning_has_an_effect_and_the_counts_are_the_plans(case: Case) -> None:
    model, images = case.model(), case.images()
    dense = case.run(model, images)
    plan = tokenprune.sparsify(model, STAGES, KEEP_RATIO).tokenprune.plan
    counts = plan.num_keep(case.num_patches)
    assert counts == tuple(int(case.num_patches * KEEP_RATIO**power + 1e-9) for power in (1, 2))

    lengths: list[int] = []
    blocks = model.tokenprune.backbone.blocks
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: lengths.append(args[0].shape[1]))
    sparse = case.run(model, images)
    prefix = case.num_prefix_tokens
    assert lengths == [prefix + case.num_patches] * 2 + [prefix + counts[0]] * 2 + [prefix + counts[1]] * 2
    assert max((sparse[name] - dense[name]).abs().max() for name in dense) > 1e-3


@every_model
@torch.no_grad()
def test_known_scores_keep_known_tokens(case: Case) -> None:
    model, images = case.sparsified(scorer=ranked), case.images()
    seen: list[Tensor] = []
    for index in (1, 2, 4):
        model.tokenprune.backbone.blocks[index].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    first_block_outputs: list[Tensor] = []
    for index in (1, 3):
        model.tokenprune.backbone.blocks[index].register_forward_hook(
            lambda block, args, output: first_block_outputs.append(output_tokens(output))
        )
    case.run(model, images)
    trace, prefix = model.tokenprune.trace, case.num_prefix_tokens
    for stage, kept in enumerate(model.tokenprune.plan.num_keep(case.num_patches)):
        assert torch.equal(trace.indices[stage], expected_positions(case, len(images), kept))
    # What went on are the very tokens the block before had put out, prefix tokens first.
    before, after = first_block_outputs[0], seen[1]
    assert torch.equal(after[:, :prefix], before[:, :prefix])
    rows = torch.arange(len(images))[:, None]
    assert torch.equal(after[:, prefix:], before[:, prefix:][rows, trace.indices[0]])
    assert trace.grid == (case.image_size[0] // 8, case.image_size[1] // 8)


@every_model
def test_every_predictor_parameter_gets_a_finite_gradient(case: Case) -> None:
    model, images = case.sparsified().train(), case.images()
    outputs = case.run(model, images)
    sum(output.square().mean() for output in outputs.values()).backward()
    trace = model.tokenprune.trace
    assert trace.execution == "mask" and all(keep.requires_grad for keep in trace.keep)
    assert all(((keep == 0) | (keep == 1)).all() for keep in trace.keep)
    assert (trace.keep[1] <= trace.keep[0]).all(), "a pruned token came back"
    for name, parameter in model.tokenprune.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@every_model
@torch.no_grad()
def test_undo_is_exact(case: Case) -> None:
    model, images = case.model(), case.images()
    before, keys, hooks = case.run(model, images), list(model.state_dict()), hook_counts(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    tokenprune.sparsify(model, STAGES, KEEP_RATIO)
    assert [key for key in model.state_dict() if not key.startswith("tokenprune.")] == keys
    assert hook_counts(model) != hooks
    case.run(model, images)
    assert tokenprune.unsparsify(model) is model
    assert list(model.state_dict()) == keys and hook_counts(model) == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    after = case.run(model, images)
    assert all(torch.equal(after[name], before[name]) for name in before)
    tokenprune.sparsify(model, STAGES, KEEP_RATIO)  # and it can be done again


@every_model
def test_copies_are_whole_and_their_own(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    model.train()
    case.run(model, images)  # leaves a trace with gradients, which a copy must not carry
    model.eval()
    with torch.no_grad():
        expected = case.run(model, images)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert copied.tokenprune.trace is None
            actual = case.run(copied, images)
            assert all(torch.equal(actual[name], expected[name]) for name in expected)
            copied.tokenprune.keep_ratio = 0.3
            assert model.tokenprune.keep_ratio[0] == KEEP_RATIO
            tokenprune.unsparsify(copied)
            assert hook_counts(copied) == [0] * len(hook_counts(copied))
            assert hook_counts(model) != [0] * len(hook_counts(model))


@every_model
def test_state_dict_round_trip(case: Case) -> None:
    model, images = case.sparsified(), case.images()
    other = tokenprune.sparsify(case.model(), STAGES, KEEP_RATIO)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, actual = case.run(model, images), case.run(other, images)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert Plan.from_json(model.tokenprune.plan.to_json()) == model.tokenprune.plan


@every_model
def test_twice_sparsified_raises(case: Case) -> None:
    model = tokenprune.sparsify(case.model(), STAGES, KEEP_RATIO)
    with pytest.raises(tokenprune.StateError, match="sparsified already"):
        tokenprune.sparsify(model)
