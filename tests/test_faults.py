"""Check that the deliberate faults of tests/faults.py fit the code, without running them."""

from tests.conftest import ROOT
from tests.faults import faults


def test_every_fault_has_its_text_once_and_an_existing_test():
    for fault in faults():
        assert (ROOT / fault.file).read_text().count(fault.old) == 1, fault
        file, name = fault.test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), fault
    assert len({fault.description for fault in faults()}) > 50
