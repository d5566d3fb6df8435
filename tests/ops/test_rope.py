from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from hybrid_engine import ops

EPS = 1e-6
BLOCK_SIZE = 7


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int = 7
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64
    rotary: int = 64  # 0: no rotation
    interleaved: bool = False
    bias: bool = False
    norms: bool = False


CASES = [
    Case("neox"),
    Case("gptj", interleaved=True),
    Case("partial", rotary=16),
    Case("partial_gptj", rotary=16, interleaved=True),
    Case("bias", bias=True, heads=8),
    Case("qk_norm", norms=True, kv_heads=4),
    Case("all", tokens=63, bias=True, norms=True, head_dim=80, rotary=32),
    Case("odd", tokens=1, head_dim=7, rotary=6, bias=True),
    Case("wide", tokens=257, heads=8, kv_heads=8, head_dim=128, rotary=128),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-N{c.tokens}-D{c.head_dim}")


@dataclass
class Inputs:
    case: Case
    qkv: torch.Tensor
    bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    cos_sin: torch.Tensor | None
    positions: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slots: torch.Tensor

    def args(self):
        return (
            self.qkv, self.bias, self.q_norm, self.k_norm, self.cos_sin, self.positions,
            self.k_cache, self.v_cache, self.slots, self.case.heads, self.case.interleaved, EPS,
        )  # fmt: skip


@pytest.fixture
def make(rng, dtype):
    def tensor(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    def inputs(case: Case) -> Inputs:
        c = case
        width = (c.heads + 2 * c.kv_heads) * c.head_dim
        angles = torch.rand(300, c.rotary // 2, generator=rng) * 6.3
        blocks = c.tokens // BLOCK_SIZE + 2
        cache = torch.full((blocks, c.kv_heads, BLOCK_SIZE, c.head_dim), float("nan"), dtype=dtype)
        slots = torch.randperm(blocks * BLOCK_SIZE, generator=rng)[: c.tokens]
        slots[c.tokens // 2 :: 5] = -1
        return Inputs(
            case=c,
            qkv=tensor(c.tokens, width),
            bias=tensor(width) if c.bias else None,
            q_norm=tensor(c.head_dim) if c.norms else None,
            k_norm=tensor(c.head_dim) if c.norms else None,
            cos_sin=torch.cat((angles.cos(), angles.sin()), -1) if c.rotary else None,
            positions=torch.randint(300, (c.tokens,), generator=rng),
            k_cache=cache,
            v_cache=cache.clone(),
            slots=slots,
        )

    return inputs


def plain(c, part, qkv, bias, q_norm, k_norm, cos_sin, positions):
    """Queries (part 0), keys (1) or values (2), (N, heads, D), in the dtype of qkv."""
    qkv = qkv if bias is None else qkv + bias
    heads = qkv.view(len(qkv), -1, c.head_dim).split([c.heads, c.kv_heads, c.kv_heads], 1)[part]
    if part == 2:
        return heads
    norm = (q_norm, k_norm)[part]
    if norm is not None:
        heads = F.rms_norm(heads, (c.head_dim,), norm, EPS)
    if cos_sin is None:
        return heads
    cos, sin = cos_sin[positions].to(heads.dtype).unsqueeze(1).chunk(2, -1)
    x = heads[..., : c.rotary].unflatten(-1, (-1, 2) if c.interleaved else (2, -1))
    a, b = x.unbind(-1 if c.interleaved else -2)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if c.interleaved else -2)
    return torch.cat((turned.flatten(-2), heads[..., c.rotary :]), -1)


@pytest.mark.isa
@cases
def test_queries_and_stored_keys_and_values(run, make, assert_accurate, case):
    inputs = make(case)
    q = run(ops.rope_and_store_kv, *inputs.args())
    operands = (
        inputs.qkv, inputs.bias, inputs.q_norm, inputs.k_norm, inputs.cos_sin, inputs.positions,
    )  # fmt: skip
    assert_accurate(q, lambda *x: plain(case, 0, *x), *operands)
    stored = inputs.slots >= 0
    block, offset = inputs.slots[stored] // BLOCK_SIZE, inputs.slots[stored] % BLOCK_SIZE
    for part, cache in ((1, inputs.k_cache), (2, inputs.v_cache)):
        found = cache[block, :, offset]
        assert_accurate(found, lambda *x, p=part: plain(case, p, *x)[stored], *operands)


@cases
def test_what_has_no_slot_stays_untouched(run, make, case):
    inputs = make(case)
    run(ops.rope_and_store_kv, *inputs.args())
    stored = inputs.slots[inputs.slots >= 0]
    for cache in (inputs.k_cache, inputs.v_cache):
        untouched = cache.transpose(1, 2).flatten(0, 1).isnan().all(-1).all(-1)  # (slots,)
        untouched[stored] = ~untouched[stored]
        assert untouched.all()


def test_without_rotation_norm_and_bias_data_only_moves(run, make):
    case = Case("move", rotary=0, heads=3, kv_heads=3, head_dim=65)
    inputs = make(case)
    inputs.slots = torch.arange(case.tokens)
    q = run(ops.rope_and_store_kv, *inputs.args())
    expected_q, expected_k, expected_v = inputs.qkv.view(-1, 9, 65).split(3, 1)
    assert torch.equal(q, expected_q)
    for cache, expected in ((inputs.k_cache, expected_k), (inputs.v_cache, expected_v)):
        assert torch.equal(cache[0].transpose(0, 1), expected)


def test_extreme_values_stay_in_their_head(run, make):
    inputs = make(Case("neox", norms=True))
    inputs.slots = torch.arange(7)
    clean = run(ops.rope_and_store_kv, *inputs.args())
    inputs.qkv[0, 0], inputs.qkv[1, 64] = float("nan"), float("inf")
    q = run(ops.rope_and_store_kv, *inputs.args())
    assert q[0, 0].isnan().all()
    assert not q[1, 1].isfinite().all()
    q[0, 0], q[1, 1] = clean[0, 0], clean[1, 1]
    assert torch.equal(q, clean)


def test_empty(run, make):
    inputs = make(replace(CASES[0], tokens=0))
    assert run(ops.rope_and_store_kv, *inputs.args()).shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": torch.ones(7, 383)}, r"qkv: expected \[any, 384\], got \[7, 383\]"),
        ({"bias": torch.ones(383)}, r"bias: expected \[384\], got \[383\]"),
        ({"k_norm": torch.ones(64).half()}, "k_norm: expected float32, got float16"),
        ({"cos_sin": torch.ones(300, 66)}, "cos_sin: expected an even width.*head_dim=64, got 66"),
        ({"positions": torch.ones(7).int()}, "positions: expected int64, got int32"),
        ({"slots": torch.ones(8).long()}, r"slot_mapping: expected \[7\], got \[8\]"),
        ({"k_cache": torch.ones(3, 7, 64)}, r"k_cache: expected \[any, any, any, any\], got"),
        ({"v_cache": torch.ones(3, 1, 64, 7).mT}, "v_cache: expected a contiguous tensor"),
    ],
    ids=["qkv", "bias", "norm", "table", "positions", "slots", "rank", "layout"],
)
@pytest.mark.parametrize("dtype", [torch.float32], ids=["fp32"])
def test_bad_input_names_argument_and_values(run, make, changed, message):
    inputs = replace(make(CASES[0]), **changed)
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.rope_and_store_kv, *inputs.args())


def test_opcheck(make):
    inputs = make(Case("all", bias=True, norms=True))
    torch.library.opcheck(ops.rope_and_store_kv.overload, inputs.args())
