"""The arithmetic of experiments/results.py, against loops and hand-made cases."""
import numpy as np
import torch

from experiments.measures import (
    attention_maps,
    block_nats,
    changed_nats,
    fact_distances,
    far_pairs,
    flops_per_token,
    keys_seen,
    lift,
    mean_and_error,
    mention_distances,
    rule_nats,
    stream_nats,
)
from model import GPT, GPTConfig
from sep_cache import is_kept, sees


def small_model(**changes):
    shape = dict(n_layer=2, n_head=2, n_embd=16, window=4, sinks=2, max_seps=3, block_size=24)
    model = GPT(GPTConfig(**{**shape, **changes})).requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(3)  # from its start a model attends almost evenly
    return model


def text_tokens(n):
    return np.frombuffer(b"a b, cd. ef\ngh! " * (n // 16 + 1), dtype=np.uint8)[:n]


def test_costs_are_those_of_the_definition(seed):
    ids = torch.from_numpy(text_tokens(40).astype(np.int64))[None]
    for attn in ("full", "streamingllm", "fixed", "sep"):
        config = small_model(attn=attn).config
        kept = is_kept(ids, torch.arange(40), config)[0].tolist()
        counts = [sum(sees(i, j, kept, config) for j in range(i + 1)) for i in range(40)]
        assert keys_seen(ids, config)[0].tolist() == counts
    model = small_model()
    # of a layer: 4 x 16 x 16 of attention, 8 x 16 x 16 of the MLP
    n_parameters = 256 * 16 + 2 * 12 * 16 * 16
    assert flops_per_token(model, 10.0) == 6 * n_parameters + 12 * 2 * 16 * 10


def test_lift_is_the_share_of_attention_over_the_share_of_keys():
    p = torch.zeros(1, 1, 4, 4)
    p[0, 0, 2] = torch.tensor([0.6, 0.2, 0.2, 0.0])
    p[0, 0, 3] = torch.tensor([0.1, 0.1, 0.5, 0.3])
    far = far_pairs(4, distance=2)
    assert far.nonzero().tolist() == [[2, 0], [3, 0], [3, 1]]
    is_kind = torch.tensor([[True, False, False, False]])
    # of 0.6 + 0.1 + 0.1 far attention 0.7 goes to key 0, which is 2 of the 3 far keys
    assert torch.isclose(lift(p, far, is_kind), torch.tensor(0.7 / 0.8 / (2 / 3))).all()
    assert far_pairs(4, 2, sinks=1).nonzero().tolist() == [[3, 1]]


def test_the_forward_of_ones_own_is_the_models_and_hides_what_it_is_told(seed):
    model = small_model(attn="full")
    blocks = torch.from_numpy(text_tokens(25).astype(np.int64))[None]
    nats = block_nats(model, text_tokens(25), 1)
    assert np.allclose(changed_nats(model, blocks), nats, atol=1e-4)
    maps = attention_maps(model, blocks[:, :-1])
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5) and not maps.triu(1).any()
    hidden = torch.zeros(24, 24, dtype=torch.bool)
    hidden[10:, 3] = True
    changed = changed_nats(model, blocks, {(0, 1): hidden})[0].numpy()
    assert np.allclose(changed[:10], nats[0, :10], atol=1e-4)
    assert not np.allclose(changed[10:], nats[0, 10:], atol=1e-4)


def test_dropped_far_keys_are_what_the_model_does(seed):
    model = small_model(separators=tuple(b",\n"))
    tokens = text_tokens(120)  # five times block_size
    streamed = stream_nats(model, tokens, 7).nats
    assert np.allclose(rule_nats(model, tokens, "dropped", 50), streamed, atol=1e-4)
    for rule in ("text", "clamped", "renumbered"):
        assert not np.allclose(rule_nats(model, tokens, rule), streamed, atol=1e-4)


def test_mentions_are_counted_from_the_last_one():
    text = b"Anna saw the river. river Anna may May"
    #        0    5   9   13    18 20    26   31  35
    words = mention_distances(text, least_length=3)
    assert words[2:4].tolist() == [0, 0] and words[0] == words[1] == words[4] == -1
    assert words[22:25].tolist() == [7, 7, 7]  # river, at 20, was at 13
    assert words[28:30].tolist() == [26, 26]
    names = mention_distances(text, least_length=3, names_only=True)
    assert names[28:30].tolist() == [26, 26]
    assert names[22] == names[37] == -1  # neither a capital, nor a word that also stands without


def test_facts_are_counted_from_the_last_mention():
    ids = torch.tensor([list(b"a7.b2.a7.\n")])
    assert fact_distances(ids, list(b"0123456789"))[0].tolist() == [0] * 7 + [6] + [0] * 2


def test_the_error_is_that_of_a_mean():
    mean, error = mean_and_error(np.array([1.0, 2.0, 3.0, 4.0]), n_stretches=4)
    assert mean == 2.5 and np.isclose(error, np.sqrt(5 / 3) / 2)
    chosen = np.array([True, True, False, True])
    mean, error = mean_and_error(np.array([1.0, 1.0, 9.0, 4.0]), chosen, n_stretches=2)
    assert mean == 2 and np.isclose(error, np.sqrt(2**2 + 2**2) * np.sqrt(2) / 3)
