"""HandleCache computes what StaticCache computes, in memory that JAX and NumPy see."""

from __future__ import annotations

import copy
import gc
import importlib.util
import re
import sys
import types

import numpy as np
import pytest

import rlx_driver as rlx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from example_programs import demo  # noqa: E402
from rlx_driver.integrations import _cache_layers  # noqa: E402
from rlx_driver.integrations.transformers import HandleCache  # noqa: E402
from transformers_models import (  # noqa: E402
    LENGTH,
    config_of,
    dynamic,
    generate,
    model_of,
    prompt_of,
    static,
)

pytestmark = pytest.mark.torch
ALL = ["llama", "qwen", "gemma", "mistral", "gpt2"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def addresses(cache):
    return [handle.address for pair in cache.handles for handle in pair]


def contents(cache):
    """Copy what the handles hold, the state too."""
    return {handle.name: np.array(handle.numpy()) for handle in cache.region}


def in_its_handles(cache):
    """Tell whether the tensors that the model writes are the memory of the handles."""
    return all(
        (layer.keys.data_ptr(), layer.values.data_ptr()) == (key.address, value.address)
        for layer, (key, value) in zip(cache.layers, cache.handles, strict=True)
    )


# --- the same tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_tokens_are_those_of_the_other_caches(name):
    model, prompt = model_of(name), prompt_of(2, 6)
    expected = generate(model, prompt, static(model))
    assert torch.equal(expected, generate(model, prompt, dynamic(model)))
    assert len(set(expected[:, 6:].flatten().tolist())) > 4, "a model that says one word tests none"
    with HandleCache(model.config, max_cache_len=LENGTH) as cache, rlx.no_copies():
        assert torch.equal(generate(model, prompt, cache), expected)
        assert in_its_handles(cache)
        assert cache.length == 21
        assert int(cache.get_seq_length()) == 21


@pytest.mark.parametrize("name", ALL)
def test_reset_and_other_batches_stay_at_their_addresses(name):
    model = model_of(name)
    with HandleCache(model.config, LENGTH, batch_size=4) as cache:
        home = addresses(cache)
        assert [key.shape[0] for key, _ in cache.handles] == [4, 4]
        for batch in (2, 4, 1, 4):
            prompt = prompt_of(batch, 5, seed=batch)
            assert cache.length == 0
            assert torch.equal(
                generate(model, prompt, cache), generate(model, prompt, static(model))
            )
            assert addresses(cache) == home
            assert in_its_handles(cache)
            cache.reset()
        held = contents(cache)
        assert held.pop("cache.state")[:, 0].tolist() == [0, 0, 4]
        assert len(held) == 4
        assert not any(each.any() for each in held.values())


def test_a_larger_batch_after_reset_gets_new_handles_where_none_were_promised():
    model = model_of("llama")
    with HandleCache(model.config, LENGTH) as cache:
        assert cache.handles == []
        generate(model, prompt_of(1, 5), cache)
        ((old, _), _) = cache.handles
        cache.reset()
        prompt = prompt_of(3, 5)
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt, static(model)))
        assert cache.handles[0][0].shape[0] == 3
        assert in_its_handles(cache)
        with pytest.raises(rlx.ClosedHandleError):
            old.torch()
        home = addresses(cache)
        cache.reset()
        generate(model, prompt_of(2, 5), cache)
        assert addresses(cache) == home


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_left_padding(name):
    model, prompt = model_of(name), prompt_of(2, 6)
    mask = torch.ones_like(prompt)
    prompt[0, :3] = mask[0, :3] = 0
    expected = generate(model, prompt, static(model), attention_mask=mask)
    with HandleCache(model.config, LENGTH) as cache:
        assert torch.equal(generate(model, prompt, cache, attention_mask=mask), expected)


@pytest.mark.parametrize("name", ALL)
def test_beam_search_reorders_inside_the_handles(name):
    model, prompt = model_of(name), prompt_of(2, 5)
    expected = generate(model, prompt, static(model), num_beams=3, num_return_sequences=2)
    with HandleCache(model.config, LENGTH, batch_size=6) as cache:
        home = addresses(cache)
        for _ in range(2):
            found = generate(model, prompt, cache, num_beams=3, num_return_sequences=2)
            assert torch.equal(found, expected)
            assert in_its_handles(cache)
            assert addresses(cache) == home
            cache.reset()


def test_reorder_moves_the_rows_that_the_indices_name():
    model = model_of("llama")
    with HandleCache(model.config, LENGTH) as cache:
        generate(model, prompt_of(3, 5), cache, new=2)
        before = contents(cache)
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        for name, new in contents(cache).items():
            old = before[name]
            assert np.array_equal(new, old if name == "cache.state" else old[[2, 0, 0]])
        with pytest.raises(rlx.ShapeError, match="3 rows"):
            cache.reorder_cache(torch.tensor([1]))


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral"])
def test_a_conversation_goes_on(name):
    model, prompt = model_of(name), prompt_of(2, 4)
    with HandleCache(model.config, LENGTH) as cache:
        first = generate(model, prompt, cache, new=9)
        longer = torch.cat([first, prompt_of(2, 3, seed=9)], dim=1)
        found = generate(model, longer, cache, new=9)
    other = static(model)
    generate(model, prompt, other, new=9)
    assert torch.equal(found, generate(model, longer, other, new=9))


def test_inference_mode_and_no_grad_in_turns():
    model, prompt = model_of("llama"), prompt_of(2, 6)
    expected = generate(model, prompt, static(model))
    with HandleCache(model.config, LENGTH) as cache:
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(generate(model, prompt, cache), expected)
                cache.reset()
        assert not cache.layers[0].keys.is_inference()


def test_memory_that_jax_owns():
    pytest.importorskip("jax")
    model, prompt = model_of("llama"), prompt_of(2, 6)
    region = rlx.HandleRegion("cpu", backend="jax")
    with HandleCache(model.config, LENGTH, region) as cache:
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt, static(model)))
        assert in_its_handles(cache)
    region.close()


def test_bfloat16():
    model, prompt = copy.deepcopy(model_of("llama")).to(torch.bfloat16), prompt_of(2, 6)
    with HandleCache(model.config, LENGTH, batch_size=2, dtype=torch.bfloat16) as cache:
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt, static(model)))
        assert cache.handles[0][0].dtype == rlx.dtype("bf16")


# --- compiled ------------------------------------------------------------------------------------


def decode(model, forward, cache, steps=10):
    prompt = prompt_of(2, 6)
    with torch.no_grad():
        token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens = [token]
        for step in range(steps):
            more = {"position_ids": torch.full((2, 1), 6 + step)}
            if not _cache_layers.COUNTS:
                more["cache_position"] = torch.tensor([6 + step])
            logits = forward(token, past_key_values=cache, **more).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
    return torch.cat(tokens, dim=1)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_compiled_decode_is_one_graph_that_stays(name):
    model = model_of(name)
    from torch._dynamo.testing import CompileCounterWithBackend

    # A window changes its program when it is full; so that the second turn finds all programs.
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model.forward, backend=counted, fullgraph=True)
    expected = decode(model, model, static(model))
    with HandleCache(model.config, LENGTH) as cache:
        assert torch.equal(decode(model, forward, cache), expected)
        assert cache.length == 16
        assert in_its_handles(cache)
        tensors = [t for each in cache.layers for t in (each.keys, each.values, each.total)]
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
        assert all(t.data_ptr() % 16 == 0 for t in tensors)
        if name == "llama":
            assert counted.frame_count == 1
        known = counted.frame_count
        cache.reset()
        assert torch.equal(decode(model, forward, cache), expected)
        assert counted.frame_count == known
    torch._dynamo.reset()


def test_a_compiled_prefill_makes_the_handles():
    model, prompt = model_of("llama"), prompt_of(2, 6)
    torch._dynamo.reset()
    forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad(), HandleCache(model.config, LENGTH) as cache:
        found = forward(prompt, past_key_values=cache).logits
        assert torch.allclose(found, model(prompt).logits, atol=1e-5)
        assert cache.length == 6
        assert in_its_handles(cache)
    torch._dynamo.reset()


# --- JAX and NumPy on the same cache -------------------------------------------------------------


@pytest.mark.jax
def test_jax_sees_what_torch_has_written():
    import jax.numpy as jnp

    model, prompt = model_of("llama"), prompt_of(2, 6)
    with HandleCache(model.config, LENGTH) as cache, rlx.no_copies():
        generate(model, prompt, cache, new=4)
        key, _ = cache.handles[1]
        held = key.jax()
        assert held.unsafe_buffer_pointer() == key.address
        assert np.array_equal(np.array(jnp.sum(held, 0)), key.numpy().sum(0))
        generate(model, prompt_of(2, 14, seed=3), cache, new=4)
        with pytest.raises(RuntimeError, match="deleted"):
            held + 1
        assert np.array_equal(np.array(key.jax() * 1), key.numpy())
        assert key.numpy()[:, :, 12:16].any()


@pytest.mark.jax
def test_a_forward_pass_waits_for_readers():
    import threading

    import jax
    import jax.numpy as jnp

    model = model_of("llama")
    big = jnp.full((700, 700), 1e-3)

    @jax.jit
    def slow_sum(x, m):
        for _ in range(12):
            m = m @ m
        return (x + m[0, 0] * 0).sum()

    slow_sum(jnp.ones((2, 2, LENGTH, 8)), big).block_until_ready()
    with HandleCache(model.config, LENGTH) as cache:
        generate(model, prompt_of(2, 6), cache, new=2)
        key, _ = cache.handles[0]
        expected = key.numpy().sum()
        out = []
        reader = threading.Thread(target=lambda: out.append(slow_sum(key.jax(), big)))
        reader.start()  # JAX keeps the programs of one thread in order
        reader.join()
        with torch.no_grad():
            model(prompt_of(2, 20), past_key_values=cache)
        assert np.isclose(float(out[0]), expected, rtol=1e-4)
        assert not np.isclose(key.numpy().sum(), expected, rtol=1e-2)


def append(cache, rows, at):
    import jax

    return jax.lax.dynamic_update_slice(cache, rows, (0, 0, at, 0))


def slide(cache, rows):
    import jax.numpy as jnp

    return jnp.concatenate([cache, rows], axis=2)[:, :, rows.shape[2] :]


def rows_of(model, prompt, start):
    """Compute the keys and values of the last tokens of a prompt in torch alone."""
    cache = dynamic(model)
    cache.activate_past_recording() if hasattr(cache, "activate_past_recording") else None
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    count = prompt.shape[1] - start
    return [
        (layer.keys[:, :, -count:].numpy().copy(), layer.values[:, :, -count:].numpy().copy())
        for layer in cache.layers
    ]


@pytest.mark.jax
@pytest.mark.parametrize("name", ["llama", "gemma", "mistral"])
def test_jax_appends_between_two_calls(name):
    """The cache holds 10 tokens by torch and 4 by JAX, and goes on as if torch had written all."""
    model = model_of(name)
    prompt = prompt_of(2, 16)
    expected = generate(model, prompt, static(model))
    with HandleCache(model.config, LENGTH) as cache, rlx.no_copies(), torch.no_grad():
        model(prompt[:, :10], past_key_values=cache)
        for layer, pair, rows in zip(
            cache.layers, cache.handles, rows_of(model, prompt[:, :14], 10), strict=True
        ):
            for handle, row in zip(pair, rows, strict=True):
                if layer.is_sliding:
                    handle.update(slide, row)
                else:
                    handle.update(append, row, cache.length)
        cache.advance(4)
        assert cache.length == 14
        assert torch.equal(generate(model, prompt, cache), expected)
        assert cache.length == 31
        assert cache.region["cache.state"].numpy()[:, 0].tolist() == [31, 31, 2]


@pytest.mark.jax
def test_jax_fills_a_cache_from_the_start():
    model, prompt = model_of("llama"), prompt_of(3, 9)
    with HandleCache(model.config, LENGTH, batch_size=3) as cache:
        for pair, rows in zip(cache.handles, rows_of(model, prompt[:, :8], 0), strict=True):
            for handle, row in zip(pair, rows, strict=True):
                handle.update(append, row, 0)
        cache.advance(8)
        assert torch.equal(generate(model, prompt, cache), generate(model, prompt, static(model)))


# --- regions and files ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral"])
@pytest.mark.parametrize("through", ["region", "file"])
def test_another_cache_goes_on(name, through, tmp_path):
    pytest.importorskip("safetensors")
    model, prompt = model_of(name), prompt_of(2, 6)
    other = static(model)
    longer = torch.cat([generate(model, prompt, other, new=8), prompt_of(2, 2)], dim=1)
    expected = generate(model, longer, other, new=12)

    region = rlx.HandleRegion("cpu")
    cache = HandleCache(model.config, LENGTH, region, batch_size=3)
    generate(model, prompt, cache, new=3)
    cache.reset()  # so that its batch has to survive one
    generate(model, prompt, cache, new=8)
    if through == "file":
        region.save(tmp_path / "cache.safetensors")
        cache.close()
        assert not region.is_closed
        assert len(region) == 0
        region = rlx.HandleRegion.load(tmp_path / "cache.safetensors")
    second = HandleCache(model.config, LENGTH, region)
    assert second.length == 13
    assert second.batch_size == 2 if hasattr(second, "batch_size") else True
    assert torch.equal(generate(model, longer, second, new=12), expected)
    assert in_its_handles(second)
    second.close()
    region.close()


def test_two_caches_in_one_region():
    model, prompt = model_of("llama"), prompt_of(2, 6)
    expected = generate(model, prompt, static(model))
    with rlx.HandleRegion("cpu") as region:
        left = HandleCache(model.config, LENGTH, region, name="left")
        right = HandleCache(model.config, 30, region, name="right", batch_size=2)
        assert torch.equal(generate(model, prompt, left), expected)
        assert torch.equal(generate(model, prompt, right), expected)
        assert "left.1.value" in region
        assert region["right.0.key"] is right.handles[0][0]


def test_the_report_shows_it_and_close_gives_it_back():
    model = model_of("llama")
    gc.collect()
    in_use = rlx.Device("cpu").memory().in_use
    with rlx.no_leaks():
        with HandleCache(model.config, LENGTH, batch_size=2) as cache:
            generate(model, prompt_of(2, 6), cache, new=2)
            needed = 2 * 2 * (2 * 2 * LENGTH * 8) * 4
            assert cache.region.byte_size == needed + 3 * 16
            assert rlx.Device("cpu").memory().in_use - in_use >= needed
            assert "cache.1.value" in str(rlx.memory_report())
        assert cache.is_closed
        cache.close()
    gc.collect()
    assert rlx.Device("cpu").memory().in_use == in_use


# --- bad input -----------------------------------------------------------------------------------


def refuses(cache, error, match, call):
    """Assert that a call raises and that neither bytes nor addresses change."""
    before = contents(cache) if cache.region else None
    with pytest.raises(error, match=match):
        call()
    if before is not None:
        after = contents(cache)
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_too_many_tokens(name):
    model = model_of(name)
    with torch.no_grad(), HandleCache(model.config, 12) as cache:
        refuses(
            cache,
            rlx.ShapeError,
            "0 tokens of 12 and was given 13",
            lambda: model(prompt_of(2, 13), past_key_values=cache),
        )
        model(prompt_of(2, 9), past_key_values=cache)
        refuses(
            cache,
            rlx.ShapeError,
            "9 tokens of 12 and was given 4",
            lambda: model(prompt_of(2, 4), past_key_values=cache),
        )
        layer = cache.layers[1]
        states = torch.zeros(2, layer.num_heads, 4, layer.k_head_dim)
        refuses(
            cache,
            rlx.ShapeError,
            "was given 4",
            lambda: [cache.update(states, states, i) for i in range(2)],
        )
        refuses(cache, rlx.ShapeError, "was given 4", lambda: cache.advance(4))
        refuses(cache, rlx.ShapeError, "forward", lambda: cache.advance(-1))
        model(prompt_of(2, 3), past_key_values=cache)
        assert cache.length == 12


def test_windows_alone_have_no_end():
    model, prompt = model_of("mistral"), prompt_of(1, 6)
    with HandleCache(model.config, 20) as cache:
        expected = generate(model, prompt, static(model, 20), new=30)
        assert torch.equal(generate(model, prompt, cache, new=30), expected)
        assert cache.length == 35


def test_batches_that_do_not_fit():
    model = model_of("llama")
    with torch.no_grad(), HandleCache(model.config, LENGTH, batch_size=2) as cache:
        refuses(
            cache,
            rlx.ShapeError,
            "room for 2 for life",
            lambda: generate(model, prompt_of(3, 4), cache),
        )
        model(prompt_of(1, 4), past_key_values=cache)
        refuses(
            cache,
            rlx.ShapeError,
            r"holds a batch of 1.*reset\(\)",
            lambda: model(prompt_of(2, 4), past_key_values=cache),
        )


def test_states_that_do_not_fit():
    model = model_of("llama")
    with HandleCache(model.config, LENGTH, batch_size=2, dtype="bf16") as cache:
        refuses(
            cache,
            rlx.DTypeError,
            "dtype='float32'",
            lambda: generate(model, prompt_of(2, 4), cache),
        )
    with HandleCache(model.config, LENGTH, batch_size=2) as cache:
        with torch.no_grad():
            other = model_of("qwen")
            refuses(
                cache,
                rlx.ShapeError,
                r"another model",
                lambda: other(prompt_of(2, 4), past_key_values=cache),
            )
            model(prompt_of(2, 4), past_key_values=cache)
            refuses(
                cache,
                rlx.ShapeError,
                r"another model",
                lambda: other(prompt_of(2, 4), past_key_values=cache),
            )
        refuses(
            cache,
            rlx.DTypeError,
            "require grad",
            lambda: model(prompt_of(2, 4), past_key_values=cache),
        )


def test_a_region_on_another_device():
    model = model_of("llama")
    with HandleCache(model.config, LENGTH, rlx.HandleRegion("mps")) as cache:
        with pytest.raises(rlx.DeviceUnavailableError, match=r"HandleRegion\('cpu'\)"):
            generate(model, prompt_of(2, 4), cache)
        assert cache.handles == []


def test_what_is_closed():
    model = model_of("llama")
    closings = [
        lambda cache: cache.close(),
        lambda cache: cache.region.close(),
        lambda cache: cache.handles[1][1].close(),
    ]
    for close in closings:
        cache = HandleCache(model.config, LENGTH)
        prompt = generate(model, prompt_of(2, 4), cache)
        close(cache)
        with pytest.raises(rlx.ClosedHandleError, match="closed"):
            generate(model, torch.cat([prompt, prompt[:, :1]], 1), cache, new=1)
        with pytest.raises(rlx.ClosedHandleError, match="closed"):
            cache.reset()
        cache.close()
    region = rlx.HandleRegion("cpu")
    region.close()
    with pytest.raises(rlx.ClosedHandleError):
        HandleCache(model.config, LENGTH, region)


def test_configs_that_have_no_decoder():
    for config in ({"hidden_size": 4}, transformers.PretrainedConfig(), None):
        with pytest.raises(rlx.DTypeError, match="model that generates text"):
            HandleCache(config, LENGTH)


def test_layers_that_no_handle_holds():
    kinds = ["linear_attention", "full_attention"]
    config = transformers.Qwen3NextConfig(num_hidden_layers=2, layer_types=kinds)
    if type(transformers.StaticCache(config=config, max_cache_len=4).layers[0]) is (
        transformers.cache_utils.StaticLayer
    ):
        pytest.skip("this transformers takes linear attention for full attention")
    with pytest.raises(rlx.DTypeError, match="layer 0 of this model is a LinearAttentionLayer"):
        HandleCache(config, LENGTH)


@pytest.mark.parametrize("number", [0, -1, 2.5, None, "8"])
def test_numbers_that_are_none(number):
    with pytest.raises(rlx.ShapeError, match="max_cache_len is a positive number"):
        HandleCache(config_of("llama"), number)
    if number is not None:
        with pytest.raises(rlx.ShapeError, match="batch_size is a positive number"):
            HandleCache(config_of("llama"), LENGTH, batch_size=number)


def test_regions_that_hold_something_else():
    config = config_of("llama")

    def fill(**changes):
        region = rlx.HandleRegion("cpu")
        shape = (2, 2, LENGTH, 8)
        spec = {f"cache.{i}.{part}": shape for i in range(2) for part in ("key", "value")}
        spec = {name: (s, "f32") for name, s in spec.items()} | {"cache.state": ((3, 2), "i64")}
        for name, entry in changes.items():
            spec[f"cache.{name.replace('_', '.')}"] = entry
        region.create({name: entry for name, entry in spec.items() if entry is not None})
        return region

    with HandleCache(config, LENGTH, fill()) as cache:
        assert cache.handles[0][0].shape == (2, 2, LENGTH, 8)
    bad = [
        ({"1_value": None}, "lacks 'cache.1.value'"),
        ({"state": None}, "lacks 'cache.state'"),
        ({"1_value": ((2, 2, 9, 8), "f32")}, "max_cache_len"),
        ({"1_value": ((2, 9), "f32")}, "max_cache_len"),
        ({"1_value": ((3, 2, LENGTH, 8), "f32")}, r"\[2, 3\]"),
        ({"state": ((3, 2), "f32")}, "not the state"),
    ]
    for changes, match in bad:
        with pytest.raises(rlx.ShapeError, match=match):
            HandleCache(config, LENGTH, fill(**changes))
    region = fill()
    region["cache.state"].numpy()[2, 0] = 7
    with pytest.raises(rlx.ShapeError, match="7 rows of 2"):
        HandleCache(config, LENGTH, region)


def test_nothing_to_advance_yet():
    with HandleCache(config_of("llama"), LENGTH) as cache:
        cache.reset()
        assert cache.length == 0
        with pytest.raises(rlx.UnboundNameError, match="no handles yet"):
            cache.advance(1)
        generate(model_of("llama"), prompt_of(1, 2), cache, new=1)
        with pytest.raises(rlx.DTypeError, match="pickle or copy"):
            copy.deepcopy(cache)


# --- transformers before 5.4 ---------------------------------------------------------------------


class PositionedLayer(_cache_layers.StaticLayer):
    """A layer as it was when models told the positions: it counts nothing."""

    def __init__(self, max_cache_len):
        super().__init__(max_cache_len=max_cache_len)
        del self.cumulative_length

    def update(self, key_states, value_states, cache_kwargs=None):
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        where = cache_kwargs["cache_position"]
        self.keys[:, :, where] = key_states
        self.values[:, :, where] = value_states
        return self.keys, self.values


class PositionedSlidingLayer(PositionedLayer):
    """Its windows counted in an int."""

    def __init__(self, max_cache_len, sliding_window):
        super().__init__(min(max_cache_len, sliding_window))
        self.cumulative_length = 0

    def update(self, key_states, value_states, cache_kwargs=None):
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, cache_kwargs)


@pytest.mark.skipif(not _cache_layers.COUNTS, reason="the layers of this transformers are the old")
def test_layers_that_do_not_count(monkeypatch):
    old = types.SimpleNamespace(
        StaticLayer=PositionedLayer, StaticSlidingWindowLayer=PositionedSlidingLayer
    )
    monkeypatch.setattr(sys.modules["transformers"], "cache_utils", old)
    path = _cache_layers.__file__
    spec = importlib.util.spec_from_file_location("layers_of_before", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.StaticLayer is PositionedLayer
    assert not module.COUNTS
    layers = module.in_handles([PositionedLayer(9), PositionedSlidingLayer(9, 4)], 9)
    store = module_store([9, 4])
    for index, layer in enumerate(layers):
        layer.place(store, index)
        for at in range(3):
            states = torch.full((2, 1, 1, 5), at + 1.0)
            layer.update(states, states, {"cache_position": torch.tensor([at])})
        assert layer.keys[0, 0, :4, 0].tolist() == [1, 2, 3, 0]
        assert layer.keys.data_ptr() == store.pairs[index][0].address
        assert int(layer.get_seq_length()) == layer.host_length() == 3
        layer.advance(2)
        assert layer.host_length() == 5
        layer.total.zero_()
        layer.go_on()
        assert layer.host_length() == 0
    assert store.state.numpy()[2, 0] == 2
    store.close()


def module_store(lengths):
    from rlx_driver.integrations._cache_store import Store

    return Store("old", None, lengths, fixed=False)


# --- the example ---------------------------------------------------------------------------------

KEEP_NOTHING = """
handle_cache.keep_row = lambda handles, row: handle_cache.jax.tree.map(lambda x: x + 0, handles)
"""


@pytest.mark.slow
@pytest.mark.jax
@pytest.mark.parametrize("spoilt", [False, True])
def test_the_example(spoilt):
    pytest.importorskip("rich")
    done = demo(name="handle_cache", before=KEEP_NOTHING if spoilt else "")
    lines = [line[:4] for line in done.stdout.splitlines() if re.match("ok|FAIL", line)]
    assert lines == ["ok  ", "FAIL" if spoilt else "ok  ", "ok  ", "ok  ", "ok  "], done.stderr
    assert done.returncode == spoilt


# --- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu(compiled):
    model = copy.deepcopy(model_of("llama")).to("cuda")
    prompt = prompt_of(2, 6).cuda()
    more = {"disable_compile": not compiled}
    expected = generate(model, prompt, static(model), **more)
    region = rlx.HandleRegion("cuda:0")
    with HandleCache(model.config, LENGTH, region, batch_size=2) as cache:
        home = addresses(cache)
        for _ in range(3):
            assert torch.equal(generate(model, prompt, cache, **more), expected)
            assert cache.length == 21
            assert addresses(cache) == home
            assert in_its_handles(cache)
            held = cache.handles[0][0].jax()
            assert np.array_equal(np.asarray(held), cache.handles[0][0].to_host().numpy())
            cache.reset()
        with pytest.raises(rlx.ShapeError, match="0 tokens of 40 and was given 41"):
            generate(model, prompt_of(2, 41).cuda(), cache)
    region.close()
