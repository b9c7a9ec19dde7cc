"""The deliberate faults of tests/faults.py still fit the code; running them takes minutes."""

from tests.conftest import ROOT
from tests.faults import faults


def test_every_fault_has_its_text_once_and_its_test():
    for fault in faults():
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault
        file, name = fault.test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), fault
    assert len({fault.what for fault in faults()}) > 50
