import json

import pytest

from fastmask.described import from_json, to_json
from fastmask.diffusion import EDM
from fastmask.diffusion.processes import PROCESSES


def test_a_process_as_json():
    process = EDM(sigma_data=0.75, p_mean=0.1, p_std=0.0)
    text = to_json(process)
    assert json.loads(text) == {"name": "edm", "sigma_data": 0.75, "p_mean": 0.1, "p_std": 0.0}
    assert from_json(text, PROCESSES, "process") == process
    assert from_json('{"name": "edm", "sigma_data": 2}', PROCESSES, "process") == EDM(sigma_data=2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "ddpm"}', "; this version knows edm, flow, vp"),
        ('{"name": ["edm"]}', "; this version knows edm, flow, vp"),
        ('{"sigma_data": 0.5}', "; this version knows edm, flow, vp"),
        ('["edm"]', "; this version knows edm, flow, vp"),
        ('{"name": "edm", "sigma_min": 0.1}', "sigma_min is no number of process edm"),
        ('{"name": "edm", "sigma_data": true}', "sigma_data is no number of process edm"),
        ('{"name": "edm", "p_std": "1.2"}', "p_std is no number of process edm"),
        ('{"name": "edm", "p_std": NaN}', "p_std must be at least 0, not nan"),
        ("edm", "Expecting value"),
        (f'{{"name": "edm", "p_std": 1{"0" * 400}}}', "a number of process edm is too large"),
    ],
)
def test_json_of_no_process(text, message):
    with pytest.raises(ValueError, match=message):
        from_json(text, PROCESSES, "process")
