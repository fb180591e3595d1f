"""Scaling laws: published constants and what the papers say of them; the fit finds constants it was given, and says how sure it is."""
import json

import numpy as np
import pytest

from llmjax import cli, settings
from llmjax.core import ConfigError
from llmjax.core.override import to_json
from llmjax.plan import laws, runs

HOFFMANN, BESIROGLU = (laws.PUBLISHED[name] for name in ("hoffmann-2022", "besiroglu-2024"))
N, D = (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 1e10, 6), np.geomspace(1e9, 3e11, 6)))


def test_published_constants():
    assert HOFFMANN.loss(70e9, 1.4e12) == pytest.approx(1.937, abs=0.001)          # Chinchilla
    assert HOFFMANN.loss(280e9, 300e9) == pytest.approx(1.993, abs=0.001)          # Gopher: worse, for the same compute
    assert HOFFMANN.exponents == pytest.approx((0.46, 0.54), abs=0.01)             # table 2, approach 3
    n, d = BESIROGLU.optimum(5.76e23)
    assert n == pytest.approx(70e9, rel=0.1) and 15 < d / n < 25                   # arXiv:2404.10102: about 20 tokens a parameter
    assert laws.Kaplan().loss(1e30, 22e9) == pytest.approx((1.8e13 / 22e9) ** 0.103)
    assert laws.Kaplan().loss(1.5e9, 1e30) == pytest.approx((6.4e13 / 1.5e9) ** 0.076)
    n, d = laws.Kaplan().optimum(laws.PF_DAY)
    assert (n, d) == (1.3e9, 2e10)


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["hoffmann", "besiroglu"])
def test_the_optimum_is_one(law):
    """Nothing else of the same compute has less loss."""
    n, d = law.optimum(1e22)
    assert 6 * n * d == pytest.approx(1e22)
    assert all(law.loss(n, d) < law.loss(n * k, d / k) for k in (0.8, 0.95, 1.05, 1.25))


@pytest.mark.parametrize("law", [HOFFMANN, BESIROGLU], ids=["hoffmann", "besiroglu"])
def test_exact_losses_give_the_constants_back(law):
    found = laws.fit(N, D, law.loss(N, D), bootstrap=0).law
    for name in ("e", "a", "b", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-3)


def test_noise_is_told_from_the_law():
    loss = BESIROGLU.loss(N, D) * np.exp(np.random.default_rng(1).normal(0, 0.002, N.size))
    done = laws.fit(N, D, loss, bootstrap=40)
    assert done.law.e == pytest.approx(BESIROGLU.e, rel=0.03) and done.law.exponents[0] == pytest.approx(BESIROGLU.exponents[0], abs=0.03)
    assert done.low["exponent_n"] < done.law.exponents[0] < done.high["exponent_n"]
    assert done.error == pytest.approx(0.002, rel=0.4)
    quiet = laws.fit(N, D, BESIROGLU.loss(N, D) * np.exp(np.random.default_rng(1).normal(0, 0.0002, N.size)), bootstrap=40)
    assert quiet.high["alpha"] - quiet.low["alpha"] < 0.5 * (done.high["alpha"] - done.low["alpha"])


def test_the_gradient_is_the_objectives():
    points = np.log([N, D, BESIROGLU.loss(N, D) * 1.01])
    x = np.array([6.0, 7.5, 0.55, 0.33, 0.36])
    _, slope = laws.objective(x, points)
    for i in range(5):
        step = np.eye(5)[i] * 1e-6
        assert slope[i] == pytest.approx((laws.objective(x + step, points)[0] - laws.objective(x - step, points)[0]) / 2e-6, rel=1e-4)


def test_an_outlier_moves_little():
    loss = BESIROGLU.loss(N, D)
    loss[7] *= 1.5
    assert laws.fit(N, D, loss, bootstrap=0).law.e == pytest.approx(BESIROGLU.e, rel=0.01)


def test_too_little_is_refused():
    with pytest.raises(ConfigError, match="six runs of three sizes"):
        laws.fit(N[:5], D[:5], BESIROGLU.loss(N[:5], D[:5]))
    with pytest.raises(ConfigError, match="above 0"):
        laws.fit(N, D, -BESIROGLU.loss(N, D))


def write_run(folder, repeats: int, steps: int, law=BESIROGLU, scale: float = 1e4, finished: bool = True, vocab: int = 512):
    """A run's folder as a real one would be, its loss out of a law (as if everything were `scale` times larger)."""
    from llmjax import models
    from llmjax.plan import figures
    config = settings.load("configs/quickstart.py:size=tiny", [f"model.repeats={repeats}", f"steps={steps}", f"model.vocab_size={vocab}"])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_json(config)))
    n, d = figures.parameters(models.Decoder(config.model))[1], steps * config.batch_size * config.context
    done = steps if finished else steps - 1
    rows = [{"step": done // 2, "loss": 5.0}, {"step": done, "loss": 3.0}, {"step": done, "eval_loss": law.loss(n * scale, d * scale)}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_a_folder_of_runs(tmp_path, capsys):
    for repeats in (2, 8, 32):
        for steps in (100, 1000, 10_000):
            write_run(tmp_path / f"l{repeats}s{steps}", repeats, steps)
    write_run(tmp_path / "cut", 4, 500, finished=False)
    assert cli.main(["plan", f"--fit={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 9 and found["fit"]["alpha"] == pytest.approx(BESIROGLU.alpha, rel=0.05) and found["fit"]["e"] == pytest.approx(BESIROGLU.e, rel=0.02)
    assert found["left_out"] == ["cut: not finished (step 499 of 500); its learning rate has not come down"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    text = runs.fit(tmp_path, bootstrap=5).text
    assert "L(N, D)" in text and "90 %" in text and "left out" in text
    write_run(tmp_path / "other", 2, 200, vocab=1024)
    assert cli.main(["plan", f"--fit={tmp_path}"]) == 2 and "vocabularies" in capsys.readouterr().err


def test_an_empty_folder(tmp_path, capsys):
    assert cli.main(["plan", f"--fit={tmp_path}"]) == 2
    assert "no finished run" in capsys.readouterr().err
