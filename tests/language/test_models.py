"""Vision-language models whose language model is given fewer image tokens, in its prompt and in its cache.

Shapes: b prompts, L tokens of each, n of them that go on.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.census.transformers_inputs import IMAGE_TOKEN
from tests.helpers.tolerances import IDENTITY, SHORTENED_PROMPT
from tests.helpers.vision_language import CASES, Case, alone, of_sizes, packed
from tests.helpers.zoo import hook_counts, wide_scorers

STAGES, RATIOS = (1, 2), (0.75, 0.5)
GENERATE: dict[str, Any] = {
    "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    "suppress_tokens": [40, 41, 42, 43],
}  # fmt: skip
BEHIND = {"stages": (), "pruner": "diverse"}


def cases(*fast: str) -> Any:
    """A test of all models, slow but for these families."""
    params = [pytest.param(case, marks=() if case.label in fast else pytest.mark.slow) for case in CASES]
    return pytest.mark.parametrize("case", params, ids=[case.label for case in CASES])


def options(case: Case) -> list[dict[str, Any]]:
    """How a model is sparsified: behind its tower alone, and in it."""
    inside = {"stages": STAGES, **({} if case.block else {"pruner": "informative"})}
    return [BEHIND, inside]


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def kept_places(model: nn.Module, ids: Tensor) -> Tensor:
    """(b, L) bool, the tokens of the prompt that went on, by what the trace says."""
    trace = model.tokenprune.language.trace
    flat = torch.zeros(sum(trace.num_tokens), dtype=torch.bool)
    starts = [sum(trace.num_tokens[:piece]) for piece in range(len(trace.num_tokens))]
    for start, indices in zip(starts, trace.indices, strict=True):
        flat[start + indices] = True
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[ids == IMAGE_TOKEN] = flat
    return keep


class Seen:
    """What the language model is given, call by call."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[dict[str, Any]] = []
        language = model.tokenprune.language.described.language
        self._handle = language.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls.append(kwargs)

    @property
    def lengths(self) -> list[int]:
        return [call["inputs_embeds"].shape[1] for call in self.calls]

    def remove(self) -> None:
        self._handle.remove()


@cases("internvl", "qwen3_vl")
def test_at_ratio_1_it_is_the_dense_model_and_undo_leaves_nothing(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    before, keys, hooks = run(model, inputs), list(model.state_dict()), hook_counts(model)
    generated = model.generate(**inputs, **GENERATE)
    for given in options(case):
        tokenprune.sparsify(model, keep_ratio=1.0, **given)
        torch.testing.assert_close(run(model, inputs), before, rtol=0, atol=IDENTITY)
        assert torch.equal(model.generate(**inputs, **GENERATE), generated)
        model.tokenprune.keep_ratio = 0.5 if given is BEHIND else RATIOS
        assert (run(model, inputs) - before).abs().max() > 1e-3
        with tokenprune.dense(model):
            assert torch.equal(run(model, inputs), before)
        tokenprune.unsparsify(model)
        assert torch.equal(run(model, inputs), before)
        assert list(model.state_dict()) == keys and hook_counts(model) == hooks
        assert "get_image_features" not in vars(model.model)


@cases("gemma3", "llava_next", "qwen3_vl")
def test_the_language_model_sees_the_planned_tokens_at_their_positions(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    counts = [int((ids[row] == IMAGE_TOKEN).sum()) for row in range(len(ids))]
    for given in options(case):
        tokenprune.sparsify(model, keep_ratio=0.5 if given is BEHIND else RATIOS, **given)
        seen = Seen(model)
        with tokenprune.dense(model):
            model.generate(**inputs, **GENERATE)
        positions = seen.calls[0]["position_ids"]  # (…, b, L) of the full prompt
        seen.calls.clear()
        generated = model.generate(**inputs, **GENERATE)
        keep = kept_places(model, ids)
        trace = model.tokenprune.language.trace
        assert all(len(kept) == number // 2 for kept, number in zip(trace.indices, trace.num_tokens, strict=True))
        assert sum(trace.num_tokens) == sum(counts)
        length = int((keep & mask).sum(dim=1).max())
        assert seen.lengths == [length, 1, 1, 1] and trace.num_kept == length
        shortened = seen.calls[0]["position_ids"]
        for row in range(len(ids)):
            wanted = positions[..., row, :][..., keep[row] & mask[row]]
            assert torch.equal(shortened[..., row, -wanted.shape[-1] :], wanted)
        later = [call["position_ids"] for call in seen.calls[1:]]
        for step, found in enumerate(later):
            assert torch.equal(found[..., 0], positions[..., -1] + 1 + step)
        assert generated.shape[1] == ids.shape[1] + 4
        seen.remove()
        tokenprune.unsparsify(model)


@cases("gemma3", "llava", "llava_next", "paligemma", "internvl", "qwen2_5_vl", "qwen3_vl")
def test_pruned_tokens_are_hidden_and_nothing_else_changes(case: Case) -> None:
    """The pruned pass is that of the dense model on the full prompt in which nobody attends to the pruned tokens."""
    window = {**case.given, "text_config": {**case.given.get("text_config", {}), "sliding_window": 500}}
    model, inputs = case._replace(given=window if case.family == "gemma3" else case.given).model(), case.inputs()
    mask = inputs["attention_mask"].bool()
    tokenprune.sparsify(model, (), 0.5, pruner="informative")
    pruned = run(model, inputs)
    assert pruned.shape[:2] == mask.shape
    keep, positions = kept_places(model, inputs["input_ids"]), model.tokenprune.language.trace.positions
    with tokenprune.dense(model):
        seen = Seen(model)
        run(model, inputs)
        full = seen.calls[0]["position_ids"]
        if full is None:
            full = torch.arange(mask.shape[1])[None]
        hidden = run(model, {**inputs, "attention_mask": (mask & keep).long(), "position_ids": full})
    assert positions.shape[-1] < mask.shape[1]
    there = mask & keep
    torch.testing.assert_close(pruned[there], hidden[there], rtol=0, atol=SHORTENED_PROMPT)
    # In the place of a pruned token stands the state of the last one before it that went on.
    for row, place in (mask & ~keep).nonzero().tolist():
        last = int(there[row, :place].nonzero().max())
        assert torch.equal(pruned[row, place], pruned[row, last])


@cases("llava", "qwen3_vl")
def test_generation_with_cache_without_and_alone_agrees(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    for given in options(case):
        wide_scorers(tokenprune.sparsify(model, keep_ratio=0.5 if given is BEHIND else RATIOS, **given))
        generated = model.generate(**inputs, **GENERATE)
        assert torch.equal(model.generate(**inputs, use_cache=False, **GENERATE), generated)
        searched = alone(inputs, case, 2) if case.swaps else inputs
        beams = model.generate(**searched, num_beams=2, **GENERATE)
        assert torch.equal(model.generate(**searched, num_beams=2, use_cache=False, **GENERATE), beams)
        for row in range(3):
            one = alone(inputs, case, row)
            assert torch.equal(model.generate(**one, **GENERATE)[:, -4:], generated[row : row + 1, -4:])
            together, by_itself = run(model, inputs)[row, -1], run(model, one)[0, -1]
            torch.testing.assert_close(by_itself, together, rtol=0, atol=SHORTENED_PROMPT)
        tokenprune.unsparsify(model)


SWAPPING = [case for case in CASES if case.swaps]
SWAPPED = [pytest.param(case, marks=() if case is SWAPPING[0] else pytest.mark.slow) for case in SWAPPING]


@pytest.mark.parametrize("case", SWAPPED, ids=[case.label for case in SWAPPING])
def test_images_that_the_library_swaps_between_beams_are_one_clear_error(case: Case) -> None:
    """GLM's own code repeats each image for all beams, where the prompts have all images of one beam after another."""
    model, inputs = case.model(), case.inputs()
    given: list[list[int]] = []

    def look(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given.append([len(tokens) for tokens in kwargs["mm_encoder_outputs"]["image"].pooler_output])

    handle = model.model.register_forward_pre_hook(look, with_kwargs=True)
    model.generate(**inputs, num_beams=2, **{**GENERATE, "max_new_tokens": 1})
    handle.remove()
    assert given[0] == [6, 6, 8, 8, 4, 4]  # and the prompts have places for 6, 8, 6, 8, 4, 4
    tokenprune.sparsify(model, **BEHIND)
    with pytest.raises(tokenprune.StateError, match="an image of 8 tokens would be in two prompts"):
        model.generate(**inputs, num_beams=2, **GENERATE)


@cases("qwen3_vl", "gemma3")
def test_without_images_nothing_is_touched(case: Case) -> None:
    model, inputs = case.model(), case.inputs()
    words = {
        name: inputs[name][:1, -4:] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs
    }
    before, generated = run(model, words), model.generate(**words, **GENERATE)
    tokenprune.sparsify(model, (), 0.5)
    run(model, inputs)
    assert torch.equal(run(model, words), before) and model.tokenprune.trace is None
    assert torch.equal(model.generate(**words, **GENERATE), generated)


@pytest.mark.parametrize("case", [case for case in CASES if case.inputs is packed], ids=lambda case: case.label)
def test_a_tower_that_packs_images_chooses_merge_groups(case: Case) -> None:
    model, inputs = tokenprune.sparsify(case.model(), STAGES, RATIOS), case.inputs()
    wide_scorers(model)
    run(model, inputs)
    groups, chosen = model.tokenprune.trace.groups, model.tokenprune.language.trace.indices
    assert [len(one) for one in groups] == [3, 4, 2]
    assert all(torch.equal(one, other) for one, other in zip(groups, chosen, strict=True))


SQUARE = [case for case in CASES if case.block and case.inputs not in (packed, of_sizes)]


@pytest.mark.parametrize("case", SQUARE, ids=lambda case: case.label)
def test_the_tower_chooses_the_tokens_that_it_kept(case: Case) -> None:
    """Of the image tokens go on those made of the patches that stayed in the tower, in its last stage above all."""
    model, inputs = case.model(), case.inputs()
    wide_scorers(tokenprune.sparsify(model, STAGES, RATIOS))
    run(model, inputs)
    trace, block = model.tokenprune.trace, case.block
    assert case.block is not None
    grid = 6 // block
    survival = sum(trace.keep).unflatten(1, (grid, block, grid, block)).sum(dim=(2, 4)).flatten(1)
    for image, kept in enumerate(model.tokenprune.language.trace.indices):
        pruned = torch.ones(grid**2, dtype=torch.bool)
        pruned[kept] = False
        assert survival[image, kept].min() >= survival[image, pruned].max()
        if block == 1:
            assert torch.equal(kept, trace.indices[-1][image])
    # Which patches a token is made of: those whose embeddings it depends on, before anything has mixed them.
    tower = model.tokenprune.language.described.tower
    tokenprune.unsparsify(model)
    first = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    for layer in first:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    images = inputs["pixel_values"].detach().clone().requires_grad_()
    found = model.model.get_image_features(pixel_values=images)
    features = getattr(found, "pooler_output", found)
    features[-1].reshape(-1, features[-1].shape[-1])[1].square().sum().backward()
    touched = images.grad.flatten(0, -4)[-1 if images.dim() == 4 else 4].abs().sum(0)
    touched = touched.unflatten(0, (6, 8)).unflatten(2, (6, 8)).sum(dim=(1, 3)) > 0  # (6, 6) of patches
    wanted = torch.zeros(6, 6, dtype=torch.bool)
    wanted[:block, block : 2 * block] = True
    assert torch.equal(touched, wanted)


def test_copies_and_pickles_have_hooks_of_their_own() -> None:
    model, inputs = CASES[0].model(), CASES[0].inputs()
    pickled = pickle.loads(pickle.dumps(tokenprune.sparsify(copy.deepcopy(model), **BEHIND)))
    wide_scorers(tokenprune.sparsify(model, STAGES, RATIOS))
    copied, expected = copy.deepcopy(model), run(model, inputs)
    assert torch.equal(run(copied, inputs), expected)
    copied.tokenprune.keep_ratio = (0.5, 0.25)
    assert copied.tokenprune.language.keep_ratio == 0.25
    before = run(copied, inputs)
    assert not torch.equal(before, expected)
    assert torch.equal(run(model, inputs), expected)
    assert not torch.equal(run(pickled, inputs), run(tokenprune.unsparsify(pickled), inputs))


def test_training_learns_through_the_prompt() -> None:
    model, inputs = CASES[0].model(), CASES[0].inputs()
    tokenprune.sparsify(model, STAGES, RATIOS).train()
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == IMAGE_TOKEN) | (inputs["attention_mask"] == 0), -100
    )
    output = model(**inputs, labels=labels)
    output.loss.backward()
    assert output.logits.shape[1] == labels.shape[1]
    logits = output.logits[:, :-1].flatten(0, 1)
    wanted = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, wanted)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.tokenprune.stages.parameters())
    assert model.tokenprune.language.trace.num_kept < labels.shape[1]
