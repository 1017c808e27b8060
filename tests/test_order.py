"""Which clip a position holds and what noise it gets."""

import pytest
import torch

from cogvideox.order import clip_at, epoch_length, epoch_order, positions_of, sampled_timestep, seeded_generator
from dataset import TrainingClips
from tests.stand_ins import UNSCALED, Noise, plan_of

FIVE = (0,) * 5


class Stored:
    """Encodings of five clips, kept in memory: moments tell which clip and side, prompts which caption."""

    def moments(self, clip, flipped=False):
        return torch.full((32, 3, 4, 6), clip + 0.5 * flipped)

    def prompt(self, clip):
        return torch.full((7, 2), -1.0 if clip is None else float(clip))


def clips(**settings):
    seed = settings.pop("seed", 1)
    return TrainingClips(Stored(), lambda position: clip_at(seed, position, FIVE, 1), seed, UNSCALED, 1000, **settings)


def test_every_epoch_holds_every_clip_once_and_no_two_epochs_are_alike():
    orders = [[clip_at(3, epoch * 9 + place, (0,) * 9, 2) for place in range(9)] for epoch in range(4)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert epoch_order(3, 0, (0,) * 9, 2) != epoch_order(4, 0, (0,) * 9, 2)


def test_processes_share_the_positions_of_a_step_without_overlap():
    for world_size, batch, accumulation in ((1, 6, 1), (2, 3, 1), (3, 2, 1), (2, 1, 3), (1, 1, 6)):
        ranks = [list(positions_of(rank, world_size, batch, accumulation, 0, 4)) for rank in range(world_size)]
        for step in range(4):
            seen = sum((b for rank in ranks for b in rank[step * accumulation : (step + 1) * accumulation]), [])
            assert sorted(seen) == list(range(step * 6, step * 6 + 6))


def test_starting_at_a_step_equals_skipping_to_it():
    whole = list(positions_of(1, 2, 2, 3, 0, 5))
    assert list(positions_of(1, 2, 2, 3, 2, 5)) == whole[6:]


def test_a_position_always_gets_the_same_noise_and_every_position_another():
    first, again, other_seed = clips()[4], clips()[4], clips(seed=2)[4]
    assert all(torch.equal(first[name], again[name]) for name in ("latents", "noise", "timestep"))
    assert not torch.equal(first["noise"], other_seed["noise"])
    items = [clips()[position] for position in range(20)]
    assert len({item["noise"].sum().item() for item in items}) == 20
    assert len({int(item["timestep"]) for item in items}) > 15


def test_each_pass_draws_a_fresh_sample_of_a_clips_posterior():
    passes = [clips()[position] for position in range(15)]
    of_clip_0 = [item["latents"] for item in passes if int(item["prompt"][0, 0]) == 0]
    assert len(of_clip_0) == 3
    assert not torch.equal(of_clip_0[0], of_clip_0[1])


def test_timesteps_are_uniform_over_all_thousand():
    values = torch.stack([clips()[position]["timestep"] for position in range(4000)]).float()
    assert values.min() < 5
    assert values.max() > 994
    counts = torch.histc(values, 10, 0, 1000)
    assert counts.min() > 330
    assert counts.max() < 470  # 400 expected, 19 is one standard deviation


def test_caption_dropout_swaps_in_the_empty_caption_at_its_rate_and_changes_no_noise():
    never, often, always = clips(), clips(caption_dropout=0.3), clips(caption_dropout=1.0)
    dropped = [often[p]["prompt"][0, 0].item() == -1 for p in range(1000)]
    assert 0.25 < sum(dropped) / 1000 < 0.35
    assert not any(never[p]["prompt"][0, 0].item() == -1 for p in range(100))
    assert all(always[p]["prompt"][0, 0].item() == -1 for p in range(100))
    assert torch.equal(never[3]["noise"], always[3]["noise"])


def test_random_flip_takes_the_mirrored_encoding_of_a_clip_half_of_the_times():
    means = [clips(random_flip=True)[p]["latents"].mean().item() - clips()[p]["latents"].mean().item() for p in range(400)]
    flipped = [mean > 0.25 for mean in means]
    assert 160 < sum(flipped) < 240
    assert all(abs(mean) < 1e-5 for mean, flip in zip(means, flipped, strict=True) if not flip)


def test_with_several_shapes_every_step_holds_one_and_every_epoch_every_clip():
    shapes = ("wide",) * 7 + ("tall",) * 2 + ("short",)
    assert epoch_length(shapes, 4) == 8 + 4 + 4
    epochs = [[clip_at(5, epoch * 16 + place, shapes, 4) for place in range(16)] for epoch in range(6)]
    for order in epochs:
        assert set(order) == set(range(10))
        assert all(len({shapes[clip] for clip in order[i : i + 4]}) == 1 for i in range(0, 16, 4))
    extra = {next(clip for clip in order if clip < 7 and order.count(clip) == 2) for order in epochs}
    assert len(extra) > 1  # not always the same clip is the one that comes twice


def timesteps(kind, positions, seed=1):
    return [int(sampled_timestep(kind, seed, p, 1000, seeded_generator(seed, "noise", p))) for p in positions]


def test_spread_timesteps_cover_the_schedule_evenly_in_any_few_neighbours_and_uniform_ones_do_not():
    def fullest_tenth(kind, first):
        return max(sum(low <= t < low + 100 for t in timesteps(kind, range(first, first + 30))) for low in range(0, 1000, 100))

    starts = (0, 17, 4000, 10**7)
    assert max(fullest_tenth("spread", first) for first in starts) <= 5
    assert max(fullest_tenth("uniform", first) for first in starts) > 5
    assert timesteps("spread", range(9)) == timesteps("spread", range(9)) != timesteps("spread", range(9), seed=2)


def test_logit_normal_timesteps_are_the_sigmoid_of_a_normal():
    drawn = torch.tensor(timesteps("logit_normal", range(4000)), dtype=torch.float64) / 1000
    assert 0 <= drawn.min() < 0.05 < 0.95 < drawn.max() < 1
    # Half of a standard normal lies within 0.6745 of 0: sigmoid(-0.6745) = 0.3375.
    assert abs(((drawn > 0.3375) & (drawn < 0.6625)).double().mean() - 0.5) < 0.02
    uniform = torch.tensor(timesteps("uniform", range(4000)), dtype=torch.float64) / 1000
    assert abs(((uniform > 0.3375) & (uniform < 0.6625)).double().mean() - 0.5) > 0.1


def test_how_timesteps_are_drawn_changes_nothing_else_of_a_position():
    plain, spread = clips()[3], clips(timestep_sampling="spread")[3]
    assert plain["timestep"] != spread["timestep"]
    assert torch.equal(plain["noise"], spread["noise"])
    assert torch.equal(plain["latents"], spread["latents"])


@pytest.mark.parametrize(("frames", "chosen"), [((9, 9, 9, 9), "first"), ((9, 9, 17, 9), 2)])
def test_the_rehearsed_clip_is_a_largest_one_and_the_first_of_the_run_if_that_is_one(frames, chosen):
    asked = []

    class Asked(Noise):
        def moments(self, clip, flipped=False):
            asked.append(clip)
            return super().moments(clip)

    plan = plan_of(clips=4)
    clips = [{"frames": count, "height": 32, "width": 48} for count in frames]
    TrainingClips(Asked(), plan.clip_of, 42, UNSCALED, 1000).largest_batch(plan, clips, 1)
    assert plan.clip_of(0) not in (0, 2)  # neither the first in the list nor the longest one
    assert asked == [plan.clip_of(0) if chosen == "first" else chosen]
