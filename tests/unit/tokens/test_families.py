"""Every name that callers use for a model leads to the right family."""

from __future__ import annotations

import pytest
from tiktoken.model import MODEL_PREFIX_TO_ENCODING, MODEL_TO_ENCODING

from sentinel_proxy.tokens import lookup
from sentinel_proxy.tokens.families import _CACHED_MODELS_MAX, _lookup, names


@pytest.mark.parametrize(
    ("model", "family", "encoding", "max_output_tokens"),
    [
        ("gpt-4o", "gpt-4o", "o200k_base", 16_384),
        ("openai/gpt-4o", "gpt-4o", "o200k_base", 16_384),
        ("vercel/openai/gpt-4o-2024-11-20", "gpt-4o", "o200k_base", 16_384),
        ("gpt-4o-2024-05-13", "gpt-4o", "o200k_base", 4_096),
        ("openai/gpt-4o-mini-2024-07-18", "gpt-4o-mini", "o200k_base", 16_384),
        ("GPT-4O-Mini", "gpt-4o-mini", "o200k_base", 16_384),
        ("gpt-4-turbo", "gpt-4-turbo", "cl100k_base", 4_096),
        ("gpt-4-0613", "gpt-4", "cl100k_base", 8_192),
        ("gpt-4.1-nano-2025-04-14", "gpt-4.1-nano", "o200k_base", 32_768),
        ("ft:gpt-4.1-mini-2025-04-14:acme:name:id", "gpt-4.1-mini", "o200k_base", 32_768),
        ("ft:gpt-3.5-turbo-0125:acme::1", "gpt-3.5", "cl100k_base", 4_096),
        ("gpt-35-turbo", "gpt-3.5", "cl100k_base", 4_096),
        ("openai/gpt-5.2", "gpt-5", "o200k_base", 128_000),
        ("openai/gpt-7-imagined", "openai", "o200k_base", None),
        ("openai/imagined", "openai", "o200k_base", None),
        ("openai/gpt-oss-120b", "gpt-oss", "o200k_base", 131_072),
        ("o3-mini", "o3", "o200k_base", 100_000),
        ("o4-mini-2025-04-16", "o4-mini", "o200k_base", 100_000),
        ("text-embedding-3-small", "text-embedding", "cl100k_base", None),
        ("text-davinci-003", "gpt-3", "p50k_base", 4_096),
        ("davinci", "gpt-3", "r50k_base", 4_096),
        ("anthropic/claude-sonnet-4.5", "claude", "o200k_base", 64_000),
        ("claude-3-5-sonnet-20241022", "claude-3", "o200k_base", 8_192),
        ("anthropic/imagined", "claude", "o200k_base", 128_000),
        ("google/gemini-2.5-pro:free", "gemini", "o200k_base", 65_536),
        ("meta/llama-3.1-8b", "llama", "cl100k_base", 131_072),
        ("nobody/knows-this", "other", "o200k_base", None),
        ("", "other", "o200k_base", None),
        ("/", "other", "o200k_base", None),
    ],
)
def test_a_name_leads_to_its_family(model: str, family: str, encoding: str, max_output_tokens: int | None) -> None:
    found = lookup(model)
    assert (found.name, found.encoding, found.max_output_tokens) == (family, encoding, max_output_tokens)


@pytest.mark.parametrize("model", sorted(MODEL_TO_ENCODING) + sorted(MODEL_PREFIX_TO_ENCODING))
def test_every_model_of_tiktokens_table_gets_tiktokens_encoding(model: str) -> None:
    table = {**MODEL_PREFIX_TO_ENCODING, **MODEL_TO_ENCODING}
    same = {"o200k_harmony": "o200k_base", "p50k_edit": "p50k_base", "gpt2": "r50k_base"}
    assert lookup(model).encoding == same.get(table[model], table[model])
    assert lookup(model).openai or model.startswith("gpt-oss")


def test_models_without_number_make_neither_labels_nor_memory_grow() -> None:
    _lookup.cache_clear()
    labels = {lookup(f"{provider}/model-{n}" * 50).label for n in range(5_000) for provider in ("openai", "who")}
    assert labels <= names()
    assert _lookup.cache_info().currsize <= _CACHED_MODELS_MAX


def test_an_endless_name_is_not_remembered_as_a_whole() -> None:
    _lookup.cache_clear()
    assert lookup("x" * 1_000_000).label == "other"
    lookup("x" * 2_000_000)
    assert _lookup.cache_info().currsize == 1


def test_only_openais_own_models_are_counted_by_openais_rules() -> None:
    assert lookup("gpt-5-mini").openai
    assert not lookup("anthropic/claude-opus-4.5").openai
    assert not lookup("unheard-of").openai
