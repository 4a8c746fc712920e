"""The losses against slow loops, and what the encoders learn from states with a planted structure."""

import math

import pytest
import torch
import torch.nn.functional as F

from unike_kernels.ops import SemanticEncoder
from unike_kernels.training import EncoderTraining, disentangle
from unike_kernels.training.encoders import semantic_loss, truthfulness_loss


def similarity(a, b, tau):
    return math.exp(float(F.cosine_similarity(a, b, dim=0)) / tau)


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_eq_4_in_loops(tau):
    pos, neg = torch.randn(2, 5, 7, dtype=torch.float64)
    total = 0.0
    for own, other in ((pos, neg), (neg, pos)):
        for h in own:
            same = sum(similarity(h, x, tau) for x in own)
            total -= math.log(same / (same + sum(similarity(h, x, tau) for x in other)))
    assert float(truthfulness_loss(pos, neg, tau)) == pytest.approx(total / 10, rel=1e-12)


@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_eq_5_in_loops(tau):
    sem, pos, neg = torch.randn(3, 5, 7, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        own = similarity(sem[i], pos[i], tau) + similarity(sem[i], neg[i], tau)
        everything = sum(similarity(sem[i], pos[j], tau) + similarity(sem[i], neg[j], tau) for j in range(5))
        total -= math.log(own / everything)
    assert float(semantic_loss(sem, pos, neg, tau)) == pytest.approx(total / 5, rel=1e-12)


def test_the_losses_want_what_they_should():
    """Eq. 4: true with true; Eq. 5: a state with its own question."""
    e = torch.eye(4)
    apart, mixed = (e[:1].expand(4, 4), e[1:2].expand(4, 4)), (e, e.roll(1, 0))
    assert truthfulness_loss(*apart, 1.0) < truthfulness_loss(*mixed, 1.0)
    assert truthfulness_loss(*apart, 1.0) == truthfulness_loss(*reversed(apart), 1.0)
    assert semantic_loss(e, e, e, 0.1) < 0.01 < 1 < semantic_loss(e, e.roll(1, 0), e.roll(1, 0), 0.1)


def planted(n=200, d=32):
    """A question in 12 dimensions, its answer near it, truth in one direction of its own, and noise."""
    generator = torch.Generator().manual_seed(4)
    content = torch.zeros(n, d)
    content[:, :12] = torch.randn(n, 12, generator=generator)
    direction = torch.zeros(d)
    direction[20] = 1.5
    noise = lambda: 0.2 * torch.randn(n, d, generator=generator)  # noqa: E731
    return content + noise(), content + direction + noise(), content - direction + noise(), direction


TRAINING = EncoderTraining(lr=3e-3, steps=300, batch_size=64)


@pytest.fixture(scope="module")
def learnt():
    sem, pos, neg, direction = planted()
    return disentangle(sem, pos, neg, TRAINING, progress=False), (sem, pos, neg, direction)


def test_planted_truth_and_content_are_told_apart_in_held_out_states(learnt):
    found, (_, pos, neg, direction) = learnt
    assert found.truth_accuracy == 1.0
    assert found.semantic_accuracy >= 0.8
    assert found.losses[-1][0] < found.losses[0][0]
    assert found.losses[-1][1] < found.losses[0][1]
    # States that were never there, by the direction that was found.
    fresh = torch.randn(50, 32) * 0.2
    with torch.no_grad():
        middle = (found.truth(pos).mean(0) + found.truth(neg).mean(0)) / 2
        for sign in (1, -1):
            side = (found.truth(fresh + sign * direction) - middle) @ found.zeta
            assert (side * sign > 0).float().mean() > 0.95


def test_w_zeta_leads_back_to_the_difference_of_the_states(learnt):
    found, (_, pos, neg, direction) = learnt
    difference = (pos - neg).mean(0)
    with torch.no_grad():
        zeta = found.truth(pos).mean(0) - found.truth(neg).mean(0)
    torch.testing.assert_close(found.zeta, zeta)
    torch.testing.assert_close(found.zeta_prime, found.w_zeta @ zeta)
    assert F.cosine_similarity(found.zeta_prime, difference, dim=0) > 0.99
    assert F.cosine_similarity(found.zeta_prime, direction, dim=0) > 0.99
    assert (found.zeta_prime - difference).norm() < 0.1 * difference.norm()


def test_weights_are_copies_in_the_operators_order(learnt):
    found, _ = learnt
    weights = found.semantic_weights()
    assert isinstance(weights, SemanticEncoder)
    x = torch.randn(3, 32)
    w1, b1, w2, b2 = weights
    torch.testing.assert_close(F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2), found.semantic(x).detach())
    assert w1.data_ptr() != found.semantic[0].weight.data_ptr()


def test_noise_is_not_separated_in_held_out_states():
    """The accuracies are of states that were not trained on: on noise they are at chance, however long one trains."""
    sem, pos, neg = torch.randn(3, 200, 32)
    found = disentangle(sem, pos, neg, EncoderTraining(lr=3e-3, steps=300, held_out=0.5, patience=99), progress=False)
    assert 0.3 < found.truth_accuracy < 0.7
    assert found.semantic_accuracy < 0.1


def test_seeds():
    sem, pos, neg, _ = planted(n=30)
    state = torch.get_rng_state()
    short = {"lr": 1e-3, "steps": 20, "batch_size": 8}
    one, same, other = (disentangle(sem, pos, neg, EncoderTraining(**short, seed=s), progress=False) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.zeta_prime, same.zeta_prime)
    assert not torch.equal(one.zeta_prime, other.zeta_prime)


def test_patience_ends_the_training():
    sem, pos, neg, _ = planted(n=30)
    still = disentangle(sem, pos, neg, EncoderTraining(lr=1e-12, steps=1000, patience=2), progress=False)
    assert len(still.losses) == 3  # at steps 0, 50 and 100


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("n", [4, 5])
def test_few_triplets_are_enough_for_training_and_validation(n, share):
    sem, pos, neg, _ = planted(n=n)
    found = disentangle(sem, pos, neg, EncoderTraining(steps=3, held_out=share), progress=False)
    assert found.zeta_prime.isfinite().all()
    assert 0 <= found.truth_accuracy <= 1


def test_sizes():
    sem, pos, neg, _ = planted(n=8)
    default = disentangle(sem, pos, neg, EncoderTraining(steps=1), progress=False)
    assert default.zeta.shape == (16,)  # d / 8 would be 4
    other = disentangle(sem, pos, neg, EncoderTraining(steps=1, bottleneck=5, truth_size=3), progress=False)
    assert (other.zeta.shape, other.w_zeta.shape) == ((3,), (32, 3))
    assert other.semantic_weights().w1.shape == (5, 32)
    with pytest.raises(ValueError, match="triplets: expected at least 4 to train and validate the encoders, got 3"):
        disentangle(*torch.randn(3, 3, 8))


@pytest.mark.parametrize("name", ["lr", "steps", "batch_size", "tau_truth", "tau_semantic", "patience"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"EncoderTraining.{name}: expected a positive number, got {value}"):
        EncoderTraining(**{name: value})


@pytest.mark.parametrize("name", ["bottleneck", "truth_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_widths_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"EncoderTraining.{name}: expected None or a positive number, got {value}"):
        EncoderTraining(**{name: value})


@pytest.mark.parametrize("value", [0, 1, -0.1, float("nan")])
def test_share_out_of_range(value):
    with pytest.raises(ValueError, match=r"EncoderTraining.held_out: expected a share between 0 and 1"):
        EncoderTraining(held_out=value)
