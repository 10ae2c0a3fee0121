from util import small_net

from fastmask.diffusion import Origin
from fastmask.exchange.card import model_card


def test_what_is_known_is_in_the_card():
    facts = {
        "config": {
            "preset": "digits",
            "data": "/home/me/my | digits/",
            "lr": 3e-3,
            "init": "",
            "run_dir": "/home/me/runs/a",
        },
        "step": 1550,
        "versions": {"torch": "2.13.0"},
        "evaluation": {
            "fid": 2.0001234,
            "protocol": {"samples": 50000, "sampling": {"solver": "heun"}},
            "classes": [1, 2],
        },
    }
    net = small_net()
    net.origin = Origin(class_names=("ant", "bee", "cat", "dog", "eel"))
    card = model_card(net, "small", "apache-2.0", facts)
    lines = card.splitlines()
    assert lines[:2] == ["---", "license: apache-2.0"]
    assert "# small" in lines
    assert (
        "A masked diffusion transformer (MaskDiT) of 22k parameters that draws samples of 3 x 8 x 8, of 5 classes."
        in lines
    )
    assert "images = pipe(class_labels=[0, 0]).images" in lines
    assert "Classes, by name or number: ant, bee, cat, dog, eel." in lines
    for row in [
        "| preset | digits |",
        "| data | my \\| digits |",
        "| lr | 0.003 |",
        "| step | 1550 |",
        "| torch | 2.13.0 |",
        "| fid | 2.00012 |",
        "| protocol.samples | 50000 |",
        "| protocol.sampling.solver | heun |",
    ]:
        assert row in lines, row
    assert "/home/me" not in card
    assert "classes |" not in card


def test_the_card_of_weights_alone():
    card = model_card(small_net(in_channels=4, num_classes=0, decoder_depth=0), "x", "unknown", {})
    assert "## Training" not in card
    assert "## Evaluation" not in card
    assert "A diffusion transformer (DiT) of " in card
    assert 'images = pipe(num_images=2, output_type="latent").images' in card
    named = model_card(small_net(in_channels=4), "x", "unknown", {}, vae="owner/vae")
    assert "- VAE: `owner/vae`" in named
    assert "output_type" not in named


def test_many_classes_are_not_all_listed():
    net = small_net(num_classes=30)
    net.origin = Origin(class_names=tuple(f"c{i}" for i in range(30)))
    assert "c18, c19 and 10 more." in model_card(net, "x", "unknown", {})
