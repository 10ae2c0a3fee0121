import json

import pytest
from util import small_net

from fastmask.diffusion import LatentSpace, Origin
from fastmask.diffusion.weights import load_maskdit, save_weights

SPACE = LatentSpace(vae="some/vae", sha256="ab", scale=[1.0, 2.0], shift=0.5)


@pytest.mark.parametrize("origin", [None, Origin(), Origin(latents=SPACE, class_names=("cat", "d\u00f6g"))], ids=str)
def test_weights_record_it(tmp_path, origin):
    net = small_net(depth=1)
    assert net.origin is None
    net.origin = origin
    save_weights(tmp_path / "weights.safetensors", net)
    assert load_maskdit(tmp_path / "weights.safetensors").origin == origin


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": "cat"}, "class_names is no list of names"),
        ({"class_names": [1]}, "class_names is no list of names"),
        ({"classes": []}, "it holds no latents and class_names"),
        ({"latents": {"vae": "a"}}, "latents has other fields than scale, sha256, shift, vae"),
        ({"latents": {**json.loads(Origin(latents=SPACE).to_json())["latents"], "vae": 1}}, "vae is no text"),
        *(
            (
                {"latents": {"vae": "", "sha256": "", "scale": 1.0, "shift": 0.0, **bad}},
                f"{next(iter(bad))} is no number",
            )
            for bad in ({"scale": 0}, {"scale": "1"}, {"scale": []}, {"scale": [1, True]}, {"shift": float("nan")})
        ),
    ],
    ids=str,
)
def test_records_that_are_refused(tmp_path, changes, message):
    fields = {"latents": None, "class_names": [], **changes}
    with pytest.raises(ValueError, match=message):
        Origin.from_json(json.dumps(fields))


def test_a_damaged_record_names_the_file(tmp_path, monkeypatch):
    net = small_net(depth=1)
    net.origin = Origin()
    monkeypatch.setattr(Origin, "to_json", lambda self: "[" * 100_000)
    save_weights(tmp_path / "weights.safetensors", net)
    with pytest.raises(ValueError, match=r"weights\.safetensors states no data that it was trained on"):
        load_maskdit(tmp_path / "weights.safetensors")
