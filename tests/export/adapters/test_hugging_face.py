"""Decoders that transformers itself makes, against the logits that it computes.

Skipped where transformers is not installed; `test_libraries.py` runs this file with its oldest and newest version.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unipinrec.errors import ExportError
from unipinrec.export.adapters.hugging_face import source_from_decoder
from unipinrec.export.bundle_writer import ExportOptions, export_bundle
from unipinrec.export.protocol import Events, ExportSource, Past

transformers = pytest.importorskip("transformers")

VOCABULARY, LONGEST = 150, 40
ITEM_TOKENS, ITEM_IDS = list(range(140, 20, -1)), [f"item-{i}" for i in range(120)]
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
PREFIXES = {"llama": (1, 2), "llama-yarn": (), "qwen2": ()}


def decoder(kind: str, **options: Any) -> Any:
    """A small random decoder whose logits are of the size that training gives them."""
    torch.manual_seed(7)
    kinds = {"llama": "Llama", "llama-yarn": "Llama", "qwen2": "Qwen2", "mistral": "Mistral"}
    special: dict[str, Any] = {
        "llama-yarn": {"rope_scaling": dict(YARN), "attention_bias": True},
        "qwen2": {"tie_word_embeddings": True},
    }
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kinds[kind]}Config")
    model = getattr(transformers, f"{kinds[kind]}ForCausalLM")
    made = model(config(**{**shape, "initializer_range": 0.15, **special.get(kind, {}), **options})).eval()
    for name, parameter in made.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return made


def logits(model: Any, prefix: tuple[int, ...], history: list[str]) -> NDArray[np.float32]:
    """The library's scores of all items after a history."""
    tokens = [*prefix, *(ITEM_TOKENS[ITEM_IDS.index(item)] for item in history)]
    with torch.no_grad():
        scores: NDArray[np.float32] = model(torch.tensor([tokens])).logits[0, -1, ITEM_TOKENS].numpy()
    return scores


def exported(model: Any, prefix: tuple[int, ...] = (), **others: Any) -> ExportSource:
    options = {"item_tokens": ITEM_TOKENS, "max_history": LONGEST, "prefix_tokens": prefix, **others}
    return source_from_decoder(model, ITEM_IDS, **options)


def events(source: ExportSource, rows: Tensor, lengths: list[int]) -> Events:
    nothing = torch.zeros_like(rows)
    return Events(
        item_vectors=source.servable.embed_items(rows, torch.empty(0), torch.empty(0)),
        actions=torch.zeros(*rows.shape, 1),
        surfaces=nothing,
        timestamps_ms=nothing,
        lengths=torch.tensor(lengths),
    )


def random_histories(count: int) -> list[list[str]]:
    rng = np.random.default_rng(3)
    return [[ITEM_IDS[row] for row in rng.integers(0, len(ITEM_IDS), n)] for n in rng.integers(1, LONGEST + 1, count)]


@pytest.mark.parametrize("kind", PREFIXES)
@torch.inference_mode()
def test_the_module_computes_the_logits_of_the_library(kind: str) -> None:
    model, prefix = decoder(kind), PREFIXES[kind]
    source = exported(model, prefix)
    table = source.servable.embed_items(torch.arange(len(ITEM_IDS)), torch.empty(0), torch.empty(0))
    lengths, splits = [LONGEST, 9, 2], torch.tensor([17, 1, 1])
    rows = torch.randint(0, len(ITEM_IDS), (3, LONGEST))
    expected = np.stack(
        [logits(model, prefix, [ITEM_IDS[row] for row in own[:n]]) for own, n in zip(rows, lengths, strict=True)]
    )
    assert np.ptp(expected) > 1.0

    def scores(hidden: Tensor) -> NDArray[np.float32]:
        return (source.servable.retrieve(hidden, None)[:, 0] @ table.T).numpy()

    np.testing.assert_allclose(scores(source.servable.encode(events(source, rows, lengths))[1]), expected, atol=1e-4)
    key_values, _ = source.servable.encode(events(source, rows[:, :20], splits.tolist()))
    later = rows.gather(1, (splits[:, None] + torch.arange(LONGEST - 17)).clamp(max=LONGEST - 1))
    new = [n - int(split) for n, split in zip(lengths, splits, strict=True)]
    past = Past(key_values=key_values, lengths=splits, timestamps_ms=torch.zeros(3, dtype=torch.int64))
    _, hidden = source.servable.extend(events(source, later, new), past)
    np.testing.assert_allclose(scores(hidden), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_hundred_users_get_the_scores_of_the_library(kind: str, differences: Any, tmp_path: Path) -> None:
    model, prefix = decoder(kind), PREFIXES[kind]
    options = ExportOptions(reference=lambda history: logits(model, prefix, list(history)))
    manifest = export_bundle(exported(model, prefix), tmp_path / "bundle", options=options)
    compared = manifest.config["reference"]["served"]
    assert compared["fresh"]["max_score_diff"] < 1e-4
    assert compared["cached fp32"]["max_score_diff"] < 1e-4
    assert compared["fresh"]["max_score_diff"] < compared["cached int8"]["max_score_diff"]
    histories = random_histories(100)
    expected = [dict(zip(ITEM_IDS, logits(model, prefix, one).tolist(), strict=True)) for one in histories]
    found = differences(tmp_path / "bundle", histories, expected)
    print(kind, compared, found)  # for docs/own-model.md
    assert {way: same for way, (_, same) in found.items()} == dict.fromkeys(("fresh", "cached", "http"), 100)
    assert max(largest for largest, _ in found.values()) < 1e-4


def test_tied_embeddings_are_stored_once() -> None:
    assert exported(decoder("qwen2")).model.item_dim == 32
    assert exported(decoder("qwen2", tie_word_embeddings=False)).model.item_dim == 64


def test_without_item_tokens_the_items_are_the_first_tokens() -> None:
    model = decoder("qwen2")
    with pytest.raises(ExportError, match="the model has 150 tokens, not 120; pass item_tokens, one for each item"):
        exported(model, item_tokens=None)
    source = source_from_decoder(model, [str(token) for token in range(VOCABULARY)], max_history=LONGEST)
    vectors = source.servable.embed_items(torch.tensor([3]), torch.empty(0), torch.empty(0))
    torch.testing.assert_close(vectors[0], model.lm_head.weight[3])


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("mistral", {}, r"MistralForCausalLM is not supported; pass one of \['LlamaForCausalLM', 'Qwen2ForCausalLM'\]"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "this Qwen2ForCausalLM attends through a sliding window",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rotary positions of type 'dynamic', whi"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(kind: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        exported(decoder(kind, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_type_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ExportError, match=rf"embed_tokens.weight is {dtype} on cpu; .*model.float\(\).cpu\(\)"):
        exported(decoder("llama").to(dtype))


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_a_layer_that_is_quantized_or_adapted_is_refused(name: str) -> None:
    class Adapted(nn.Linear):
        """As PEFT and bitsandbytes put in the place of a linear layer."""

    model = decoder("llama")
    model.set_submodule(name, Adapted(32, 32))
    with pytest.raises(ExportError, match=f"{name} is a Adapted, not a plain linear layer; load the model without"):
        exported(model)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"item_tokens": range(119)}, "there are 119 item_tokens for 120 items"),
        ({"item_tokens": range(40, 160)}, "item_tokens holds 150, but the tokens of this model are 0 to 149"),
        ({"prefix": (-1,)}, "prefix_tokens holds -1, but"),
        ({"max_history": 63, "prefix": (1, 2)}, "max_history=63 is beyond the 62 events that this model has"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ExportError, match=match):
        exported(decoder("llama"), **options)
