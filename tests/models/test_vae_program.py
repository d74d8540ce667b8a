"""``python -m models.vae``: what it prints, draws and saves, in its fast mode."""

import numpy as np
import pytest
import torch

from models.vae import LIKELIHOODS, main, storage

TINY = ["--fast", "--latent-dim", "2", "--hidden", "16", "--flow-hidden", "8", "--bins", "4"]
BOTH = ["--prior", "flow", "--posterior", "flow"]


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in ("elbo", "iwae"))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_program_prints_bounds_as_bounds(likelihood, capsys):
    binarise = ["--binarise", "threshold"] if likelihood == "bernoulli" else []
    bounds = main([*TINY, "--likelihood", likelihood, *binarise])
    printed = capsys.readouterr().out
    assert bounds.sizes["obs_id"] == 30 and bounds.attrs["event_size"] == 64
    for quantity in ("ELBO", "IWAE-10"):
        line = next(line for line in printed.splitlines() if line.startswith(quantity))
        assert "lower bound" in line
    assert f"{float(bounds['elbo'].mean()):.2f}" in printed and "gap, IWAE-10 - ELBO" in printed
    assert f"{likelihood} likelihood" in printed and "20 steps" in printed


def test_the_program_says_what_the_data_have_chosen(capsys):
    main([*TINY, "--data", "wine"])
    printed = capsys.readouterr().out
    assert "chosen by the data: normal likelihood" in printed and "data as loaded" in printed
    main(TINY)
    assert "chosen by the data: none binarisation (greyness" in capsys.readouterr().out


def test_the_program_says_what_the_gap_is_made_of_and_which_latents_are_in_use(capsys):
    main([*TINY, "--gaps", "2"])
    printed = capsys.readouterr().out
    assert "Of 2 test rows and as many training rows" in printed
    assert "are the family's (approximation)" in printed and "posterior collapse" in printed


def test_fewer_rows_for_the_ladder_than_for_the_elbo(capsys):
    bounds = main([*TINY, "--eval-rows", "7"])
    printed = capsys.readouterr().out
    assert bounds.sizes["obs_id"] == 7
    assert "ELBO of all 30 test rows" in printed and "On 7 test rows" in printed


def test_a_saved_vae_is_evaluated_to_the_same_numbers(tmp_path, capsys):
    path = str(tmp_path / "vae.pt")
    trained = main([*TINY, *BOTH, "--binarise", "static", "--save", path])
    capsys.readouterr()
    assert same(trained, main(["--fast", "--evaluate", path]))
    printed = capsys.readouterr().out
    assert "training" not in printed.replace("training rows", "")
    assert "static binarisation" in printed and "2 latents" in printed
    torch.load(path, weights_only=True)  # nothing in it is executed
    assert not same(trained, main(["--fast", "--evaluate", path, "--binarise", "threshold"]))


def test_every_option_of_the_training_has_its_effect(tmp_path, capsys):
    plain = main(TINY)
    for options in (
        ["--kl-warm-up", "0.2"],
        ["--free-bits", "3"],
        ["--average", "0.9"],
        ["--dropout", "0.5"],
        ["--lr", "0.02"],
        ["--batch-size", "20"],
        ["--seed", "1"],
        ["--refine-encoder", "5"],
        ["--networks", "conv", "--channels", "2"],
    ):
        assert not same(plain, main([*TINY, *options])), options
    flows = main([*TINY, *BOTH])
    for options in (
        ["--couplings", "1"],
        ["--context-dim", "3"],
        ["--no-path-gradient"],
        ["--prior-dropout", "0.5"],
        ["--two-stage", "5"],
    ):
        assert not same(flows, main([*TINY, *BOTH, *options])), options
    capsys.readouterr()
    main([*TINY, "--max-seconds", "0.001"])
    assert "max_seconds" in capsys.readouterr().out
    checkpoints = ["--checkpoints", str(tmp_path / "points")]
    whole = main([*TINY, *checkpoints])
    assert same(whole, main([*TINY, *checkpoints, "--resume"]))
    assert any((tmp_path / "points").iterdir())
    with pytest.raises(ValueError, match="or resume=True"):
        main([*TINY, *checkpoints])


def test_without_a_number_of_steps_the_time_decides_how_many_they_are(capsys):
    small = ["--data", "wine", "--latent-dim", "2", "--hidden", "8", "--num-samples", "30"]
    for options, share, end in (
        (["--max-seconds", "1"], 10, "max_seconds"),
        (["--max-seconds", "1000", "--steps", "5"], 90, "max_steps"),
    ):
        main([*small, *options])
        printed = capsys.readouterr().out
        assert f"0.1 to 1 over {share}%" in printed and end in printed


def test_the_weight_of_the_kl_rises_for_a_few_passes_but_not_of_a_trained_vae(tmp_path, capsys):
    path = str(tmp_path / "plain.pt")
    plain = main([*TINY, "--save", path])
    # of 20 steps; five passes are ten batches of 128, or five of 300
    assert "weight of the KL: 0.1 to 1 over 50% of the training" in capsys.readouterr().out
    main([*TINY, "--batch-size", "300"])
    assert "over 25% of the training" in capsys.readouterr().out
    more = main([*TINY, *BOTH, "--start-from", path])
    printed = capsys.readouterr().out
    assert "weight of the KL" not in printed
    assert float((more["elbo"] - plain["elbo"]).mean()) > 0


@pytest.mark.parametrize("prior", ["flow", "autoregressive"])
def test_two_stages_say_what_they_are(prior, capsys):
    main([*TINY, "--prior", prior, "--two-stage", "5", "--refine-encoder", "5"])
    printed = capsys.readouterr().out
    stages = ("standard prior: 20 steps", "prior on frozen codes: 20", "the model's samples: 20")
    assert all(stage in printed for stage in stages)


def test_the_pictures_are_there_and_open(tmp_path, capsys):
    from matplotlib.image import imread

    main([*TINY, *BOTH, "--pictures", str(tmp_path / "new")])
    printed = capsys.readouterr().out
    for name in ("bounds", "samples", "reconstructions", "interpolations"):
        picture = imread(tmp_path / "new" / f"{name}.png")
        assert picture.shape[0] > 50 and picture.std() > 0 and f"{name}.png" in printed
    main([*TINY, "--data", "iris", "--pictures", str(tmp_path / "table")])
    assert [path.name for path in (tmp_path / "table").iterdir()] == ["bounds.png"]


def test_options_that_need_each_other_say_so(capsys):
    for options, message in (
        (["--two-stage", "5"], "expected --prior flow for --two-stage"),
        (["--resume"], "expected --checkpoints FOLDER for --resume"),
    ):
        with pytest.raises(SystemExit):
            main([*TINY, *options])
        assert message in capsys.readouterr().err


def test_a_file_that_is_no_vae_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="Expected a VAE of pyro_flowkit, got None"):
        storage.load(tmp_path / "other.pt")
