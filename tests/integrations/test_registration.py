"""`import peft_loraswitch` is all it takes: before, after, twice, reloaded, in other processes, on other Pythons."""

from __future__ import annotations

import copy
import enum
import inspect
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import textwrap
from pathlib import Path

import peft.utils.peft_types
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import peft_loraswitch
from fresh import run_python
from helpers import adapted, switch_config, tiny_llama, tokens
from paths import ROOT
from peft_loraswitch import peft_names

pytestmark = pytest.mark.compat


# ------------------------------------------------------------------------------------------------------------ the enum


def test_the_member_is_like_peft_s_own():
    member = PeftType("LORASWITCH")
    assert member is PeftType["LORASWITCH"] is PeftType.LORASWITCH
    assert member == "LORASWITCH" and isinstance(member, PeftType) and isinstance(member, str)
    assert member.value == "LORASWITCH" and member.name == "LORASWITCH"
    assert member in PeftType and "LORASWITCH" in set(PeftType)
    assert list(PeftType).count(member) == 1 and list(PeftType)[-1] is member
    assert "LORASWITCH" in PeftType.__members__ and len(PeftType) == len(list(PeftType))
    assert repr(member) == "<PeftType.LORASWITCH: 'LORASWITCH'>" and str(member) == str(PeftType.LORA).replace(
        "LORA", "LORASWITCH"
    )
    assert hash(member) == hash("LORASWITCH") and {member: 1}["LORASWITCH"] == 1
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "LORASWITCH"}
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.copy(member) is member and copy.deepcopy(member) is member
    assert PeftType.LORA is PeftType("LORA") and PeftType.LORA != member
    with pytest.raises(ValueError, match="NOPE"):
        PeftType("NOPE")
    with pytest.raises(AttributeError):
        PeftType.LORASWITCH = "other"


def test_extending_again_changes_nothing():
    members = list(PeftType)
    assert peft_names.extend_peft_type() is PeftType.LORASWITCH
    assert list(PeftType) == members


def test_peft_s_maps():
    assert PEFT_TYPE_TO_CONFIG_MAPPING["LORASWITCH"] is peft_loraswitch.LoRASwitchConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORASWITCH] is peft_loraswitch.LoRASwitchModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORASWITCH] == "loraswitch_"


ENUM_CHECKS = """
    import copy, enum, json, pickle, sys, types

    class PeftType(str, enum.Enum):
        LORA = "LORA"
        IA3 = "IA3"

    # the function as it is in the package, without the package: PEFT need not exist for this Python
    source = open(sys.argv[1]).read() if len(sys.argv) > 1 else SOURCE
    namespace = {"PeftType": PeftType, "NAME": "LORASWITCH", "enum": enum}
    exec(source, namespace)
    member = namespace["extend_peft_type"]()
    assert namespace["extend_peft_type"]() is member
    assert member is PeftType("LORASWITCH") is PeftType["LORASWITCH"] is PeftType.LORASWITCH
    assert isinstance(member, PeftType) and member == "LORASWITCH" and member.value == member.name == "LORASWITCH"
    assert [m.name for m in PeftType] == ["LORA", "IA3", "LORASWITCH"] == list(PeftType.__members__)
    assert len(PeftType) == 3 and member in PeftType
    if sys.version_info >= (3, 12):
        assert "LORASWITCH" in PeftType and "NOPE" not in PeftType
    assert repr(member) == "<PeftType.LORASWITCH: 'LORASWITCH'>"
    assert json.dumps([member]) == '["LORASWITCH"]'
    assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
    try:
        PeftType("NOPE")
    except ValueError:
        print("ok", sys.version_info[:2])
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_enum_on_other_pythons(version):
    """The one function that reaches into `enum`, alone, on every Python of this machine."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        candidates = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        if not candidates:
            pytest.skip(f"no Python {version} on this machine")
        python = str(candidates[-1])
    source = "from __future__ import annotations\n" + inspect.getsource(peft_names.extend_peft_type)
    code = f"SOURCE = {source!r}\n" + textwrap.dedent(ENUM_CHECKS)
    result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok")


def test_the_enum_where_python_keeps_a_list_of_hashable_values():
    """Later 3.12 and 3.13 look up `"LORASWITCH" in PeftType` in a list of their own."""

    class Types(str, enum.Enum):  # as PEFT's own
        LORA = "LORA"

    if not hasattr(Types, "_hashable_values_"):
        type.__setattr__(Types, "_hashable_values_", ["LORA"])
    namespace = {"PeftType": Types, "NAME": "LORASWITCH", "enum": enum}
    exec("from __future__ import annotations\n" + inspect.getsource(peft_names.extend_peft_type), namespace)
    namespace["extend_peft_type"]()
    namespace["extend_peft_type"]()
    assert list(Types._hashable_values_) == ["LORA", "LORASWITCH"]


# -------------------------------------------------------------------------------------------------- orders of importing

WORKS = """
from helpers import *
model = adapted(tiny_llama())
backbone = tiny_llama()
backbone.add_adapter(switch_config())
import tempfile
from peft import PeftModel
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(tiny_llama(), folder)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    fresh = tiny_llama()
    fresh.load_adapter(folder)
    assert torch.equal(fresh(tokens()).logits, model(tokens()).logits)
    (open(folder + "/adapter_model.safetensors", "wb")).close()
    try:
        PeftModel.from_pretrained(tiny_llama(), folder)
    except ValueError as error:
        assert "truncated" in str(error)
        print("ok")
"""
ORDERS = {
    "first of all": """
import peft_loraswitch, sys
assert not {"trl", "datasets", "pandas", "matplotlib"} & set(sys.modules)  # slow, and not needed
import peft, transformers
""",
    "last of all, twice": """
try:
    import trl
    from trl import SFTTrainer
except ImportError:
    pass
from transformers import AutoModelForCausalLM, PreTrainedModel
from peft import PeftModel, get_peft_model, PeftConfig
from peft.utils.peft_types import PeftType as taken
import peft_loraswitch, peft_loraswitch as again
assert taken("LORASWITCH") in taken
""",
    "reloaded, then purged and imported again": """
import importlib, sys, peft, peft_loraswitch
for _ in range(2):
    importlib.reload(peft_loraswitch.integrations)
    importlib.reload(peft_loraswitch.config)
    importlib.reload(peft_loraswitch)
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORASWITCH"] is peft_loraswitch.LoRASwitchConfig
first, config_class, load = peft_loraswitch, peft_loraswitch.LoRASwitchConfig, peft.PeftModel.load_adapter
for name in [name for name in sys.modules if name.startswith("peft_loraswitch")]:
    del sys.modules[name]
import peft_loraswitch
assert peft_loraswitch is not first and peft_loraswitch.LoRASwitchConfig is not config_class
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LORASWITCH"] is peft_loraswitch.LoRASwitchConfig
assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["LORASWITCH"] is peft_loraswitch.LoRASwitchModel
assert [t.value for t in peft.PeftType].count("LORASWITCH") == 1
assert peft.PeftModel.load_adapter.__wrapped__ is load.__wrapped__  # by the new code instead of the old, not by both
""",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.slow
def test_orders_of_importing(order):
    assert run_python(ORDERS[order] + WORKS).endswith("ok\n")


# ------------------------------------------------------------------------------------------------------ other processes


def load_in_worker(folder: str, queue: multiprocessing.Queue) -> None:
    import peft_loraswitch  # noqa: F401

    model = PeftModel.from_pretrained(tiny_llama(), folder)
    with torch.no_grad():
        queue.put((model.peft_config["default"].peft_type, model(tokens()).logits.numpy()))


@pytest.mark.slow
def test_spawned_worker(tmp_path):
    """A process that starts from nothing, and gets the configuration by pickle as data loaders and launchers do."""
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=load_in_worker, args=(str(tmp_path), queue))
    worker.start()
    peft_type, logits = queue.get(timeout=240)
    worker.join(60)
    assert worker.exitcode == 0
    assert peft_type is PeftType.LORASWITCH
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(logits), model(tokens()).logits)


def test_under_xdist(request):
    """CI runs this suite with `-n 2`: then each worker has imported the package by itself, both at once."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("not in a worker of pytest-xdist: run pytest -n 2")
    assert os.environ["PYTEST_XDIST_WORKER"].startswith("gw")
    assert list(PeftType).count(PeftType("LORASWITCH")) == 1


@pytest.mark.slow
def test_loading_without_the_import(tmp_path):
    """Whatever PEFT says: it does not know the method. The model card and the README say what is missing. A pickled
    configuration brings the import along."""
    model = get_peft_model(tiny_llama(), switch_config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    code = f"""
    import pickle, sys
    from peft import AutoPeftModelForCausalLM, PeftConfig
    for load in (PeftConfig.from_pretrained, AutoPeftModelForCausalLM.from_pretrained):
        try:
            load({str(tmp_path)!r})
        except Exception as error:
            print(type(error).__name__, error)
    assert "peft_loraswitch" not in sys.modules
    print(pickle.loads({pickle.dumps(switch_config(num_experts=7))!r}).num_experts)
    print(PeftConfig.from_pretrained({str(tmp_path)!r}).num_experts)
    """
    assert run_python(code) == "KeyError 'LORASWITCH'\n" * 2 + "7\n4\n"
    for text in ((tmp_path / "README.md").read_text(), (ROOT / "README.md").read_text()):
        assert "import peft_loraswitch" in text


def test_peft_config_finds_our_class(tmp_path):
    switch_config().save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), peft_loraswitch.LoRASwitchConfig)
    assert peft.utils.peft_types.PeftType is PeftType
