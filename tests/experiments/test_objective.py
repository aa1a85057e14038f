"""experiments/objective.py: exact distances, fitted utilities, and a run with copies of the reference."""

import gzip
import json
import shutil

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from common.files import ROOT
from data.society.truth import list_stories, optimum
from experiments import lab, objective
from scripts import call


def test_no_policy_has_a_higher_objective_than_the_optimum():
    world = lab.read_world()
    reference, utility = np.array(world["story_reference_logp"]), lab.story_utilities(world)

    def value(p, alpha):
        return p @ (utility - alpha * np.log(p) + 0.1 * reference)

    for alpha in (0.1, 0.2, 0.4):
        p, best = optimum(reference, utility, alpha, 0.1), objective.highest_objective(alpha)
        near = 0.9 * p + 0.1 * np.exp(reference) / np.exp(reference).sum()
        assert best == pytest.approx(value(p, alpha)) and best > value(near, alpha)
        zeros = {"story": 0, "name": 0, "malformed": 0}
        assert objective.distances(p, alpha) == pytest.approx(zeros, abs=1e-9)


def test_fitted_utilities_are_those_of_scikit_learn():
    world = lab.read_world()
    fitted, stories = objective.fitted_utilities(world), list_stories(world)
    index = {story: i for i, story in enumerate(stories)}
    with gzip.open(ROOT / "data/society/train.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    pairs = [(index.get(row["chosen"]), index.get(row["rejected"])) for row in rows]
    chosen, rejected = np.array([pair for pair in pairs if None not in pair]).T  # without misspelt names
    sizes = [len(values) for values in world["slots"].values()]
    slots = np.unravel_index(np.arange(len(stories)), sizes)  # the last slot fastest
    x = np.concatenate([np.eye(size)[slot] for size, slot in zip(sizes, slots, strict=True)], 1)
    sign = np.where(np.arange(len(chosen)) % 2, 1, -1)  # it wants both classes
    model = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-8, max_iter=1000)
    model.fit((x[chosen] - x[rejected]) * sign[:, None], sign)
    error = fitted - x @ model.coef_[0]
    assert np.std(error) < 0.02 * np.std(fitted)  # the misspelt ones, 3% of the pairs, change it a little


def test_objective_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(objective, "RATIOS", {2: "red"})
    monkeypatch.setattr(objective, "RATES", (1e-3,))
    trained = []

    def copy_reference(script, folder, *flags):
        trained.append((script, *map(str, flags)))
        shutil.copytree(lab.REFERENCE, folder)
        (folder / "metrics.jsonl").write_text('{"step": 0, "objective": -1}\n{"step": 5, "objective": 1}\n')

    probs = lab.story_probs(lab.REFERENCE, lab.read_world())
    monkeypatch.setattr(lab, "story_probs", lambda *_: probs)  # all eight policies are the reference
    monkeypatch.setattr(lab, "train", copy_reference)
    monkeypatch.chdir(tmp_path)
    call(objective, seeds=2)
    assert len(trained) == 8 and sum(run[0] == "train_rl.py" for run in trained) == 4
    printed = capsys.readouterr().out
    p = np.exp(lab.read_world()["story_reference_logp"])
    far = objective.distances(p, 0.2)["story"]
    assert printed.count(f"{far:.3f} ± 0.000") == 4  # both methods, in both panels
    assert printed.count(f"{100 * (1 - p.sum()):.2f} ± 0.00") == 4
    assert (tmp_path / "assets/objective.png").stat().st_size > 10_000
