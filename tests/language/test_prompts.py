"""Prompts and caches: conversations, hand-written loops, prompts of other lengths, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune
from tests.census.transformers_inputs import IMAGE_TOKEN, NUM_PATCHES
from tests.helpers.tolerances import SHORTENED_PROMPT
from tests.helpers.vision_language import CASES, Case, alone, prompts

LLAVA = next(case for case in CASES if case.family == "llava")
GENERATE: dict[str, Any] = {
    "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    "suppress_tokens": [40, 41, 42, 43],
}  # fmt: skip
some_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.label in ("llava", "paligemma", "qwen3_vl")], ids=lambda case: case.label
)


def cache_of(model: Any, output: Any) -> Any:
    return model.tokenprune.language.described.cache_in(output)


def sparsified(case: Case = LLAVA, **given: Any) -> tuple[nn.Module, dict[str, Any]]:
    return tokenprune.sparsify(case.model(), (), 0.5, **given), case.inputs()


@some_cases
def test_a_loop_written_by_hand_goes_on_at_the_right_positions(case: Case) -> None:
    """A pass that is given no positions goes on from the full prompt, not from what the cache holds."""
    model, inputs = sparsified(case)
    expected = model.generate(**inputs, **GENERATE)[:, -4:]
    banned = torch.tensor(GENERATE["suppress_tokens"])
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        mask, cache, found = inputs["attention_mask"], cache_of(model, output), []
        for _ in range(4):
            found.append(output.logits[:, -1].index_fill(1, banned, -torch.inf).argmax(dim=1, keepdim=True))
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = {}
            if case.family != "qwen3_vl":  # in a padded batch its users have to count as generate does
                positions = {"position_ids": mask.cumsum(1)[:, -1:] - int(case.family != "paligemma")}
            output = model(input_ids=found[-1], attention_mask=mask, past_key_values=cache, **positions)
    one = alone(inputs, case, 2)
    with torch.no_grad():
        first = model(**one, use_cache=True)
        second = model(input_ids=found[0][2:], past_key_values=cache_of(model, first))
        ids = torch.cat([one["input_ids"], found[0][2:]], dim=1)
        longer = {name: one[name] for name in one if name not in ("token_type_ids", "mm_token_type_ids")}
        types = {name: torch.nn.functional.pad(one[name], (0, 1), value=int(case.family == "paligemma"))
                 for name in one if name.endswith("type_ids")}  # fmt: skip
        together = model(**{**longer, **types, "input_ids": ids, "attention_mask": torch.ones_like(ids)})
    torch.testing.assert_close(second.logits[:, -1], together.logits[:, -1], rtol=0, atol=SHORTENED_PROMPT)
    assert torch.equal(torch.cat(found, dim=1)[2:], expected[2:])


@some_cases
def test_a_conversation_goes_on_from_its_cache(case: Case) -> None:
    model, inputs = sparsified(case)
    one = alone(inputs, case, 2)
    first = model.generate(**one, return_dict_in_generate=True, **GENERATE)
    more = torch.cat([first.sequences, torch.tensor([[9, 8, 7]])], dim=1)
    given: dict[str, Any] = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in one:
            length = more.shape[1] - one[name].shape[1]
            given[name] = torch.nn.functional.pad(one[name], (0, length), value=int(case.family == "paligemma"))
    images = {name: one[name] for name in ("pixel_values", "image_grid_thw") if name in one}
    afresh = model.generate(**given, **images, **GENERATE)
    grids = {name: images[name] for name in ("image_grid_thw",) if name in images}
    again = model.generate(**given, **grids, past_key_values=cache_of(model, first), **GENERATE)
    assert torch.equal(again, afresh)


def test_candidates_of_assisted_generation_are_taken_back() -> None:
    model, inputs = sparsified()
    one = alone(inputs, LLAVA, 2)
    one["input_ids"][0, -2:] = one["input_ids"][0, -3]  # something to look up
    options = {**GENERATE, "max_new_tokens": 8}
    seen: list[int] = []
    language = model.tokenprune.language.described.language
    language.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"].shape[1]), with_kwargs=True)
    found = model.generate(**one, prompt_lookup_num_tokens=3, **options)
    assert max(seen[1:]) > 1  # several candidates at a time
    assert torch.equal(found, model.generate(**one, **options))


def test_a_prompt_may_have_places_for_the_kept_tokens_alone() -> None:
    model, inputs = sparsified(pruner="informative")
    model(**inputs)
    chosen = model.tokenprune.trace.indices
    short = {**inputs, **prompts([NUM_PATCHES // 2] * 3)}
    with torch.no_grad():
        output = model(**short)
    assert output.logits.shape[1] == short["input_ids"].shape[1]
    found = model.tokenprune.trace
    assert all(torch.equal(one, other) for one, other in zip(found.indices, chosen, strict=True))
    assert found.num_kept == found.length == short["input_ids"].shape[1]
    assert torch.equal(
        model.generate(**short, **GENERATE)[:, -4:], model.generate(**short, use_cache=False, **GENERATE)[:, -4:]
    )


def test_other_numbers_of_places_are_refused() -> None:
    model, inputs = sparsified()
    for count in (NUM_PATCHES - 1, NUM_PATCHES // 2 + 1, 1):
        with pytest.raises(tokenprune.PromptError) as caught:
            model(**{**inputs, **prompts([count] * 3)})
        for part in (f"have {3 * count} places", "id 40", "give 108, of which 54 go on at keep_ratio=0.5"):
            assert part in str(caught.value)
    assert model(**inputs).logits.shape[0] == 3  # nothing is left behind
    with tokenprune.dense(model), pytest.raises(ValueError, match="do not match"):
        model(**{**inputs, **prompts([NUM_PATCHES // 2] * 3)})


def test_outputs_have_a_state_for_each_token_of_the_prompt() -> None:
    model, inputs = sparsified()
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
        states = model.model(**inputs, return_dict=False)
    assert all(states.shape[:2] == (3, length) for states in output.hidden_states)
    assert torch.equal(output.hidden_states[-1], states[0])
    assert torch.equal(model.lm_head(states[0]), output.logits)
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, output.logits[:, -2:])
    places = torch.tensor([0, length - 3])
    assert torch.equal(model(**inputs, logits_to_keep=places).logits, output.logits[:, places])


def test_embeddings_and_encoded_images_are_taken_in_place_of_ids_and_pixels() -> None:
    model, inputs = sparsified()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    others = {name: inputs[name] for name in ("attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(model(inputs_embeds=embeddings, **others).logits, expected, rtol=0, atol=1e-6)
        if "mm_encoder_outputs" in model.forward.__code__.co_varnames or hasattr(model, "_supports_mm_encoder_outputs"):
            encoded = {"image": model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)}
            words = {name: inputs[name] for name in ("attention_mask", "input_ids")}
            assert torch.equal(model(**words, mm_encoder_outputs=encoded).logits, expected)
            assert len(encoded["image"].pooler_output[0]) == NUM_PATCHES  # the caller's own is left as it was


def test_positional_arguments_and_the_bare_model() -> None:
    bare = LLAVA.model().model
    inputs = LLAVA.inputs()
    with torch.no_grad():
        before = bare(**inputs).last_hidden_state
        tokenprune.sparsify(bare, (), 0.5)
        expected = bare(**inputs).last_hidden_state
        found = bare(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).last_hidden_state
        assert torch.equal(found, expected) and not torch.equal(found, before)
        assert torch.equal(tokenprune.unsparsify(bare)(**inputs).last_hidden_state, before)


def test_what_cannot_be_shortened_is_refused() -> None:
    model, inputs = sparsified()
    with pytest.raises(tokenprune.StateError, match="static cache"):
        model.generate(**inputs, cache_implementation="static", **GENERATE)
    one = alone(inputs, LLAVA, 2)
    cache = cache_of(model, model(**one, use_cache=True))
    held = cache.get_seq_length()
    token = torch.tensor([[9]])
    with pytest.raises(
        tokenprune.StateError, match=r"attention_mask has 24 entries; expected 42: one for each of the 41"
    ):
        model(input_ids=token, past_key_values=cache, attention_mask=torch.ones(1, held + 1, dtype=torch.long))
    cache.crop(-6)
    with pytest.raises(tokenprune.StateError, match=f"holds {held - 6} tokens of 1 prompts, and {held} of 1 prompts"):
        model(input_ids=token, past_key_values=cache)
    with pytest.raises(tokenprune.StateError, match="behind its vision tower alone"):
        tokenprune.verify(model, inputs)


def test_wrong_use_is_one_clear_error_and_changes_nothing() -> None:
    model = LLAVA.model()
    for given, error, words in (
        ({"pruner": "divers"}, ValueError, r"choose from \['diverse', 'informative', 'random'\]"),
        ({"pruner": 3}, TypeError, "callable pruner"),
        ({"keep_ratio": 1.5}, tokenprune.PlanError, "1.5"),
        ({"scorer": "random"}, tokenprune.PlanError, "leaves the vision tower as it is"),
        ({"pruner": "tower"}, tokenprune.PlanError, "nothing to decide"),
    ):
        with pytest.raises(error, match=words):
            tokenprune.sparsify(model, (), **given)
        assert not hasattr(model, "tokenprune") and not model.model._forward_pre_hooks
    tokenprune.sparsify(model, (), 0.5)
    with pytest.raises(tokenprune.StateError, match="sparsified already"):
        tokenprune.sparsify(model, (), 0.5)
    with pytest.raises(tokenprune.StateError, match="sparsified already"):
        tokenprune.sparsify(model, (1, 2))
    vit = torch.nn.Linear(2, 2)
    with pytest.raises(tokenprune.UnsupportedModelError, match="no vision-language model"):
        tokenprune.sparsify(vit, pruner="diverse")


def test_rows_of_a_batch_are_filled_with_tokens_that_nobody_attends_to() -> None:
    """Of prompts without padding, the one with more image tokens comes out shorter than the others."""
    model, inputs = sparsified(pruner="random")
    words = prompts([NUM_PATCHES] * 3)
    words["input_ids"] = words["input_ids"].masked_fill(words["attention_mask"] == 0, 9)
    words["attention_mask"] = torch.ones_like(words["attention_mask"])
    given: dict[str, Tensor] = {**inputs, **words}
    with torch.no_grad():
        together = model(**given).logits
        for row, images in ((0, ()), (1, (0, 1)), (2, (2,))):
            one = {name: value[row : row + 1] for name, value in words.items()}
            pixels = {"pixel_values": inputs["pixel_values"][list(images)]} if images else {}
            kept = (one["input_ids"] != IMAGE_TOKEN)[0]
            by_itself = model(**one, **pixels).logits
            torch.testing.assert_close(together[row, kept], by_itself[0, kept], rtol=0, atol=SHORTENED_PROMPT)


def test_what_a_language_model_is_given_is_saved(tmp_path: Any) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs()
    tokenprune.sparsify(model, (1, 2), (0.75, 0.5), pruner="informative")
    model.tokenprune.language.keep_ratio = 0.25
    tokenprune.save_pretrained(model, tmp_path / "own", model_card=False)
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(**inputs).logits
        for folder in ("own", "theirs"):
            loaded = tokenprune.from_pretrained(tmp_path / folder)
            assert loaded.tokenprune.language.pruner_name == "informative"
            assert torch.equal(loaded(**inputs).logits, expected)
    model.tokenprune.language.pruner = lambda tokens, grid, k: torch.arange(k)
    with pytest.warns(UserWarning, match="the pruner has no registered name"):
        tokenprune.save_pretrained(model, tmp_path / "unnamed", model_card=False)
    with pytest.raises(tokenprune.CheckpointError, match="pass pruner="):
        tokenprune.from_pretrained(tmp_path / "unnamed")
    loaded = tokenprune.from_pretrained(tmp_path / "unnamed", pruner="random")
    assert loaded.tokenprune.language.pruner_name == "random"
