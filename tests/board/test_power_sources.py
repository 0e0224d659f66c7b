"""Sources of power and their traps: INA3221 on a tree, NVML and jtop as far as they can be imitated.

The real jtop service is in test_power_board.py. Nothing here may import the real ``jtop``: it changes multiprocessing.
"""

from __future__ import annotations

import datetime
import math
import random
import sys
import time
import types
from itertools import pairwise

import pytest
from board import CHIP, HWMON, make_tree, write

from cdkd_edge.board.power import ina3221, polled
from cdkd_edge.board.power.energy import Trace, rail_energy
from cdkd_edge.board.power.ina3221 import Ina3221Reader, Ina3221Stream
from cdkd_edge.board.power.jtop import JtopStream, StampClock, rails_of
from cdkd_edge.board.power.nvml import NvmlReader
from cdkd_edge.board.power.polled import PolledStream
from cdkd_edge.board.power.protocol import Accuracy, LostSourceError, Sample, UnusableSourceError
from cdkd_edge.board.power.sampler_child import open_stream


def probed(kind, *arguments):
    """A reader and no reason, or none and why."""
    try:
        return kind(*arguments), ""
    except UnusableSourceError as error:
        return None, error.reason


# --- INA3221 --------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "sys", (18.95, 9.5, 3.25))


def test_rails_by_label(tree):
    reader, reason = probed(Ina3221Reader, tree)
    assert reason == ""
    assert (reader.scope, reader.quantity, reader.total) == ("module", "watts", "VDD_IN")
    assert reader.read() == {"VDD_IN": 18.95, "VDD_CPU_GPU_CV": 9.5, "VDD_SOC": 3.25}


def test_channels_in_another_order(tree):
    for channel, label in enumerate(("VDD_SOC", "VDD_IN", "NC"), 1):
        write(tree / HWMON / f"in{channel}_label", label)
    assert probed(Ina3221Reader, tree)[0].read() == {"VDD_SOC": 18.95, "VDD_IN": 9.5}


def test_a_channel_that_is_switched_off(tree):
    write(tree / HWMON / "in3_enable", 0)
    write(tree / HWMON / "in1_enable", 1)
    assert list(probed(Ina3221Reader, tree)[0].read()) == ["VDD_IN", "VDD_CPU_GPU_CV"]


def test_without_vdd_in_nothing_is_summed_up(tree):
    write(tree / HWMON / "in1_label", "VDD_GPU_SOC")
    reader, reason = probed(Ina3221Reader, tree)
    assert reader is None
    assert "no VDD_IN, only VDD_GPU_SOC, VDD_CPU_GPU_CV, VDD_SOC" in reason


@pytest.fixture
def agx_orin(tmp_path):
    """Its two chips; two of the second one's channels are not connected."""
    root = tmp_path / "agx"
    for chip, labels in (
        ("1-0040", ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")),
        ("1-0041", ("NC", "VDDQ_VDD2_1V8AO", "NC")),
    ):
        folder = root / f"bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon{chip[-1]}"
        for channel, label in enumerate(labels, 1):
            write(folder / f"in{channel}_label", label)
            write(folder / f"in{channel}_input", 5000)
            write(folder / f"curr{channel}_input", 100 * channel)
    return root


def test_an_agx_orin_has_rails_and_no_total(agx_orin):
    reader, reason = probed(Ina3221Reader, agx_orin)
    assert reason == ""
    assert reader.total is None
    assert reader.scope == "rails of a module", "never compared with VDD_IN"
    assert reader.read() == {"VDD_GPU_SOC": 0.5, "VDD_CPU_CV": 1.0, "VIN_SYS_5V0": 1.5, "VDDQ_VDD2_1V8AO": 1.0}
    assert "VIN_SYS_5V0, VDDQ_VDD2_1V8AO, each for itself: they do not add up" in reader.covers
    info = PolledStream(reader, 0.1).info
    assert (info.scope, info.total, len(info.rails)) == ("rails of a module", None, 4)


def test_an_agx_orin_without_one_of_its_rails(agx_orin):
    chip = agx_orin / "bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon1"
    (chip / "curr2_input").write_text("")
    assert probed(Ina3221Reader, agx_orin) == (None, "VDDQ_VDD2_1V8AO cannot be read")
    write(chip / "in2_label", "NC")
    assert "no VDD_IN, only VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0" in probed(Ina3221Reader, agx_orin)[1]


@pytest.mark.parametrize("text", ["", "nonsense"])
@pytest.mark.parametrize("file", ["in1_input", "curr1_input"])
def test_probed_by_a_reading(tree, file, text):
    (tree / HWMON / file).write_text(text)
    reader, reason = probed(Ina3221Reader, tree)
    assert reader is None
    assert reason == "VDD_IN cannot be read"


def test_more_than_the_chip_can_read_is_no_reading(tree):
    reader, _ = probed(Ina3221Reader, tree)
    write(tree / HWMON / "curr1_input", 10**9)
    assert reader.read() == {"VDD_CPU_GPU_CV": 9.5, "VDD_SOC": 3.25}
    write(tree / HWMON / "curr1_input", -4)
    assert reader.read()["VDD_IN"] == pytest.approx(-0.02), "an offset is a reading"
    for channel in (1, 2, 3):
        write(tree / HWMON / f"curr{channel}_input", 10**9)
    with pytest.raises(OSError, match=r"VDD_SOC reads 5e\+06 W, more than the chip can measure"):
        reader.read()


def test_no_chip(tmp_path):
    assert probed(Ina3221Reader, tmp_path)[0] is None
    assert "no INA3221" in probed(Ina3221Reader, tmp_path)[1]
    assert "no INA3221" in probed(Ina3221Reader, tmp_path / "absent")[1]


def test_a_rail_that_disappears_is_absent(tree):
    reader, _ = probed(Ina3221Reader, tree)
    (tree / HWMON / "curr2_input").unlink()
    (tree / HWMON / "in3_input").write_text("")  # as it is while a file is written in place
    assert reader.read() == {"VDD_IN": 18.95}
    (tree / HWMON / "in1_input").unlink()
    with pytest.raises(OSError, match=r"curr2_input|in1_input|invalid literal"):
        reader.read()


def test_two_chips_with_the_same_label(tree):
    second = tree / CHIP.replace("1-0040", "1-0041")
    write(second / "hwmon/hwmon4/in1_label", "VDD_SOC")
    write(second / "hwmon/hwmon4/in1_input", 1000)
    write(second / "hwmon/hwmon4/curr1_input", 1000)
    (tree / "bus/i2c/drivers/ina3221/1-0041").symlink_to("../../devices/1-0041")
    assert probed(Ina3221Reader, tree)[0].read()["VDD_SOC (1-0041)"] == 1.0


# --- NVML -----------------------------------------------------------------------------------------


class NvmlError(Exception):
    pass


def nvml(energy=(5000,), power=(30_000,), init=None):
    """NVML as it answers; an exception is raised."""

    def answer(values):
        def ask(handle):
            value = values[handle]
            if isinstance(value, Exception):
                raise value
            return value

        return ask

    def start():
        if init:
            raise init

    return types.SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(energy),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"H200" if handle else "L4",
        nvmlDeviceGetTotalEnergyConsumption=answer(energy),
        nvmlDeviceGetPowerUsage=answer(power),
    )


def probed_nvml(module):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pynvml", module)
        return probed(NvmlReader)


def test_nvml_energy_comes_first():
    reader, _ = probed_nvml(nvml((5000, 7500), (1, 1)))
    assert (reader.scope, reader.quantity) == ("GPU board", "joules")
    assert reader.read() == {"GPU 0 L4": 5.0, "GPU 1 H200": 7.5}


def test_nvml_power_where_there_is_no_counter():
    reader, _ = probed_nvml(nvml((NvmlError("Not Supported"),)))
    assert (reader.quantity, reader.read()) == ("watts", {"GPU 0 L4": 30.0})


def test_nvml_on_a_jetson_initialises_and_supports_nothing():
    reader, reason = probed_nvml(nvml((NvmlError("Not Supported"),), (NvmlError("Not Supported"),)))
    assert reader is None
    assert reason == "NVML: energy: Not Supported; power: Not Supported"


def test_nvml_that_answers_zero_is_no_source():
    assert probed_nvml(nvml((0,), (NvmlError("Not Supported"),)))[0] is None


@pytest.mark.parametrize(
    ("module", "said"), [(nvml(init=NvmlError("Driver Not Loaded")), "Driver"), (nvml((), ()), "no GPU")]
)
def test_nvml_without_a_gpu(module, said):
    reader, reason = probed_nvml(module)
    assert reader is None
    assert said in reason


def test_nvml_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert probed(NvmlReader) == (None, "NVML: nvidia-ml-py is not installed")


def test_a_board_that_stops_answering():
    energy = [5000, 7500]
    reader, _ = probed_nvml(nvml(energy, (1, 1)))
    energy[0] = NvmlError("GPU is lost")
    assert reader.read() == {"GPU 1 H200": 7.5}
    energy[1] = NvmlError("GPU is lost")
    with pytest.raises(OSError, match="GPU is lost"):
        reader.read()


# --- what jtop says -------------------------------------------------------------------------------

RAIL = {"VDD_SOC": {"power": 1000, "avg": 7, "online": True}, "VDD_CV": {"power": 500, "online": False}}


def reading(power=6000, name="VDD_IN", **more):
    return {"rail": RAIL, "tot": {"power": power, "avg": 9999, "name": name, "online": True, **more}}


def test_vdd_in_is_in_tot_and_avg_is_never_read():
    assert rails_of(reading()) == {"VDD_IN": 6.0, "VDD_SOC": 1.0}


def test_no_sensor():
    assert "no power sensor" in rails_of({})


@pytest.mark.parametrize("total", [{"power": 1500, "avg": 1500}, None, {"power": 1, "name": ""}])
def test_a_total_that_is_a_sum_is_not_the_module(total):
    assert "sum of other rails, not VDD_IN" in rails_of({"rail": RAIL, "tot": total})


@pytest.mark.parametrize("name", ["POM_5V_IN", "VIN"])
def test_a_total_of_another_board_is_not_vdd_in(name):
    assert f"the total is {name}, not VDD_IN" in rails_of(reading(name=name))


def test_supplies_are_no_rails(tmp_path, monkeypatch):
    """Entries as jetson-stats 4.2.9 makes them of a USB-C port and of a battery; they have no type."""
    for name in ("ucsi-source-psy-2-00081", "battery"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("cdkd_edge.board.power.jtop.SUPPLIES", tmp_path)
    entry = {"volt": 20000, "curr": 3250, "warn": 3250, "power": 65000, "avg": 65000, "online": True}
    power = {**reading(), "rail": {**RAIL, "2-00081": entry, "battery": entry}}
    assert rails_of(power) == {"VDD_IN": 6.0, "VDD_SOC": 1.0}


@pytest.mark.parametrize("power", [None, "6000", float("nan"), float("inf"), 6e9])
def test_a_total_without_a_value(power):
    assert "no value" in rails_of(reading(power))
    assert "no value" in rails_of(reading(online=False))


# --- the client, imitated -------------------------------------------------------------------------


class JtopException(Exception):  # noqa: N818 - its name
    pass


class Client:
    """Hands out what the test tells it to."""

    refuse = ()  # raised by start(), one after the other
    server_interval = 0.1
    script = ()  # (uptime relative to now, power)
    error = None  # raised by ok()
    going_on = True
    made = 0

    def __init__(self, interval):
        self.asked, self.interval = interval, self.server_interval
        type(self).made += 1

    def attach(self, observer):
        self.observer = observer

    def start(self):
        if self.made <= len(self.refuse):
            raise self.refuse[self.made - 1]
        print("a library that prints")
        for offset, power in self.script:
            self.show(offset, power)

    def show(self, offset, power):
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.uptime, self.power = datetime.timedelta(seconds=round(now + offset, 2)), power
        self.observer(self)

    def ok(self, spin=False):
        assert spin, "waiting would end the client after three intervals"
        if self.error:
            raise self.error
        return self.going_on

    def close(self):
        pass


@pytest.fixture
def client(monkeypatch):
    kind = type("Client", (Client,), {"script": [(0.02, reading())]})
    monkeypatch.setitem(sys.modules, "jtop", types.SimpleNamespace(jtop=kind, JtopException=JtopException))
    return kind


def connected():
    """A stream whose first sample has been taken."""
    stream = JtopStream()
    assert isinstance(stream.next(0), Sample)
    return stream


def test_first_sample(client):
    stream = JtopStream()
    assert stream.info.rails == ("VDD_IN", "VDD_SOC")
    assert (stream.info.total, stream.info.source_interval, stream.info.notes) == ("VDD_IN", 0.1, ())


def test_duplicates_are_dropped(client):
    stream = connected()
    stream._client.show(0.5, reading(7000))
    stream._client.observer(stream._client)
    stream._client.observer(stream._client)
    assert stream.next(0.5).values["VDD_IN"] == 7.0
    assert stream.next(0.1) is None


def test_what_was_measured_for_an_earlier_client_is_not_taken(client):
    client.script = [(-600, reading(99_000)), (0.02, reading(6000))]
    stream = connected()
    stream._client.show(0.3, reading(6100))
    values = [stream.next(0.2)]
    assert values[0].values["VDD_IN"] == 6.1
    assert stream.info.rails == ("VDD_IN", "VDD_SOC")


@pytest.mark.parametrize(("power", "said"), [({}, "no power sensor"), (reading(name="VIN"), "VIN, not VDD_IN")])
def test_refused_if_no_reading_is_usable(client, power, said):
    client.script = [(0.02, power), (0.12, power)]
    with pytest.raises(UnusableSourceError, match=said):
        JtopStream(first_reading=0.3)


def test_nothing_arrives(client):
    client.script = []
    with pytest.raises(UnusableSourceError, match="no measurement arrived"):
        JtopStream(first_reading=0.2)


def test_a_wrong_total_in_between_is_no_sample(client):
    stream = connected()
    stream._client.show(0.2, {"rail": RAIL, "tot": {"power": 1000, "avg": 1}})
    stream._client.show(0.4, reading(8000))
    assert "sum of other rails" in stream.next(0.2)
    assert stream.next(0.2).values["VDD_IN"] == 8.0


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(32, "Broken pipe"),
        EOFError(),
        JtopException("Lost connection with jtop server"),
        KeyError("gpu"),
    ],
)
def test_the_service_stops(client, error):
    stream = connected()
    client.error = error
    with pytest.raises(LostSourceError, match=f"service stopped .{type(error).__name__}"):
        stream.next(1)


def test_ok_turns_false(client):
    stream = connected()
    client.going_on = False
    with pytest.raises(LostSourceError, match="client ended"):
        stream.next(1)


def test_the_service_is_not_asked_for_a_round_interval(client):
    stream = JtopStream(0.1)
    assert stream._client.asked == pytest.approx(0.0953)
    assert stream.info.interval == 0.1


def test_another_client_has_set_the_interval(client):
    client.server_interval = 1.0
    info = JtopStream(0.1).info
    assert (info.source_interval, info.nominal_interval) == (1.0, 1.0)
    assert "another jtop client has set the interval to 1 s" in info.notes[0]


def test_a_slow_first_measurement_is_tried_again(client):
    client.refuse = (JtopException("Error connection"),) * 2
    JtopStream()
    assert client.made == 3


@pytest.mark.parametrize(
    ("error", "said", "hint"),
    [
        (JtopException("Error connection"), "Error connection", "restart jtop"),
        (JtopException("The jtop.service is not active. Please run:\nsudo"), "not active", "restart jtop"),
        (JtopException("I can't access jtop.service.\nPlease logout"), "may not talk", "usermod -aG jtop"),
        (PermissionError(13, "Permission denied"), "may not talk", "usermod -aG jtop"),
        (
            JtopException("Mismatch version jtop service: [4.2.9] and client: [7.2.2]"),
            r"\[4.2.9\]",
            "same jetson-stats",
        ),
        (JtopException("Mismatch of Python versions between library and service"), "Mismatch", "same jetson-stats"),
        (JtopException("Authentication with jetson-stats server failed"), "Authentication", "restart"),
        (ConnectionResetError(104, "reset"), "reset", "restart"),
        (EOFError(), "EOFError", "restart"),
    ],
)
def test_refusals_say_what_to_do(client, error, said, hint):
    client.refuse = (error,) * 3
    with pytest.raises(UnusableSourceError, match=said) as caught:
        JtopStream()
    assert hint in caught.value.hint


def test_intervals_that_break_the_service(client):
    with pytest.raises(UnusableSourceError, match="breaks"):
        JtopStream(0.01)
    assert client.made == 0


def test_jtop_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "jtop", None)
    with pytest.raises(UnusableSourceError, match="not installed"):
        JtopStream()


# --- clocks and polling ---------------------------------------------------------------------------


def test_late_arrival_does_not_move_a_reading():
    clock = StampClock(lambda: 1000.0)
    clock.moment(5.0, 1005.025)
    moment, uncertainty = clock.moment(6.0, 1006.9)
    assert moment == pytest.approx(1006.015)
    assert uncertainty == pytest.approx(0.015)


@pytest.mark.parametrize("base", [-5000.0, 5000.0])
def test_an_uptime_of_another_system_gives_differences(base):
    clock = StampClock(lambda: 1000.0)
    first, _ = clock.moment(base + 5.0, 1005.03)
    second, uncertainty = clock.moment(base + 6.0, 1006.5)
    assert second - first == pytest.approx(1)
    assert first == pytest.approx(1005.03)
    assert uncertainty >= 0.1


class Slow:
    name, scope, covers, quantity, total = "slow", "module", "", "watts", None

    def __init__(self, *durations):
        self.durations = list(durations)

    def read(self):
        if self.durations:
            time.sleep(self.durations.pop(0))
        return {"a": 1.0}

    def close(self):
        pass


def test_times_that_have_passed_are_not_made_up_for():
    stream = PolledStream(Slow(0, 0.0, 0.35), 0.4)
    step = 0.4 / 4
    stream.next(1)
    begin = stream._due
    samples = [stream.next(1) for _ in range(4)]
    assert all(isinstance(sample, Sample) for sample in samples)
    slots = [int((sample.time - sample.uncertainty - begin) / step) for sample in samples]
    # The second took 0.35 s. What follows keeps to the steps: nothing is read twice to catch up.
    assert all(b > a for a, b in pairwise(slots))
    assert slots[2] >= 5
    assert samples[1].uncertainty >= 0.17


class Clock:
    """Stands for the module ``time``; it passes when somebody sleeps."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Rippling:
    """A mean of 15 W: a ripple of 6 W, or peaks of 40 W that last for 12 ms over what lies between them."""

    name, scope, covers, quantity, total = "rippling", "module", "", "watts", "a"

    def __init__(self, clock, hertz, shape, phase):
        self.clock, self.hertz, self.shape, self.phase = clock, hertz, shape, phase

    def read(self):
        turn = ((self.clock.now - 1000) * self.hertz + self.phase) % 1
        if self.shape == "peaks":
            share = 0.012 * self.hertz
            return {"a": 40.0 if turn < share else (15 - 40 * share) / (1 - share)}
        return {"a": 15 + 6 * (math.sin(2 * math.pi * turn) if self.shape == "sine" else 1 if turn < 0.5 else -1)}

    def close(self):
        pass


@pytest.mark.parametrize(
    ("hertz", "shape"),
    [
        *((hertz, shape) for hertz in (5, 10, 20, 25, 30, 40, 50, 60, 80, 100) for shape in ("sine", "square")),
        (2, "peaks"),
        (5, "peaks"),
        (20, "peaks"),
        (40 / 3, "peaks"),
    ],
)
def test_the_bound_of_watts_holds_for_loads_that_change_in_step_with_the_readings(monkeypatch, hertz, shape):
    """Read at regular moments, 40 in a second, those of 40 and 80 Hz are off by up to 40 per cent, and none of the
    peaks need be seen."""
    clock = Clock()
    monkeypatch.setattr(polled, "time", clock)
    monkeypatch.setattr(polled, "random", random.Random(1))
    for phase in (0.1, 0.3, 0.45, 0.8):
        start = clock.now = 1000.0
        stream = PolledStream(Rippling(clock, hertz, shape, phase), 0.1)
        samples = []
        while clock.now < start + 30.5:
            samples.append(stream.next(1))
        assert len(samples) == pytest.approx(30.5 * 40, abs=3)
        trace = Trace(stream.info, tuple(samples), (), start, clock.now)
        energy = rail_energy(trace, "a", start, start + 30)  # whole periods: 450 J
        assert abs(energy.joules - 450) < energy.bound < 0.1 * 450
        assert (trace.gaps(), trace.late) == ((), 0)


class RipplingChip(Rippling):
    """The ripple on the first rail of an INA3221. Each read waits for a whole cycle; or, as with Linux's driver, for a
    conversion that was not read yet."""

    name, rails, every_read_waits = "ina3221", ("a", "b", "c"), True
    last = 0

    def cycle(self):
        return 0.0066, 1

    def wait(self):
        self.clock.now += 5e-5
        if self.every_read_waits or self.clock.now // 0.0066 <= self.last:
            self.clock.now += 0.0066
        self.last = self.clock.now // 0.0066

    def read_volts(self, rail):
        self.wait()

    def read_watts(self, rail):
        self.wait()
        if rail != "a":
            return 1.0
        now = self.clock.now
        if not self.every_read_waits:
            self.clock.now = self.last * 0.0066
        value = super().read()["a"]
        self.clock.now = now
        return value

    def read(self):
        for rail in self.rails:
            self.read_volts(rail)
        return {rail: self.read_watts(rail) for rail in self.rails}


@pytest.mark.parametrize("every_read_waits", [True, False])
@pytest.mark.parametrize(
    ("hertz", "shape"),
    [
        (5, "sine"),
        (5, "peaks"),
        (10, "square"),
        (20, "sine"),
        (40, "square"),
        (49, "square"),
        (50, "sine"),
        (50, "square"),
        (75, "sine"),
    ],
)
def test_ripples_that_a_chip_at_its_own_pace_is_read_through(monkeypatch, hertz, shape, every_read_waits):
    """The longer, the better: 12 s are within 3 per cent, 30 s are known to be (of peaks, twice as much)."""
    clock = Clock()
    monkeypatch.setattr(polled, "time", clock)
    monkeypatch.setattr(ina3221, "time", clock)
    monkeypatch.setattr(ina3221, "random", random.Random(1))
    for phase in (0.1, 0.45):
        start = clock.now = 1000.0
        chip = RipplingChip(clock, hertz, shape, phase)
        chip.every_read_waits = every_read_waits
        stream, samples = Ina3221Stream(chip, 0.1), []
        while clock.now < start + 61:
            samples.append(stream.next(1))
        trace = Trace(stream.info, tuple(samples), (), start, clock.now)
        assert 85 < trace.rate < 130
        assert len(trace.series("b")) == pytest.approx(610, rel=0.2)
        for seconds, most in ((12, 0.03), (30, 0.02), (60, 0.012)):
            energy = rail_energy(trace, "a", start + 0.5, start + 0.5 + seconds)  # whole periods
            error, bound = energy.watts / 15 - 1, energy.bound / energy.joules
            print(f"{hertz} Hz {shape}, {seconds} s: {error:+.2%}, bound {bound:.2%}")
            peaks = 2 if shape == "peaks" else 1
            assert abs(error) < most * peaks
            assert abs(energy.watts - 15) < energy.bound / seconds < 15 * peaks * 0.16 / math.sqrt(seconds)
        assert (trace.gaps("a"), trace.gaps("b"), trace.late) == ((), (), 0)


def test_rails_without_a_total_take_turns(agx_orin):
    stream = open_stream("ina3221", 0.1, agx_orin)
    samples = [stream.next(1) for _ in range(33)][1:]
    assert [rail for sample in samples for rail in sample.values] == list(stream.info.rails) * 8


def test_a_chip_that_takes_the_mean_of_many_samples_says_so(tree):
    write(tree / HWMON / "samples", 16)
    write(tree / HWMON / "update_interval", 106)
    info = open_stream("ina3221", 0.1, tree).info
    assert info.notes == ("the INA3221 has a new value every 0.11 s only (samples: 16)",)
    assert (info.interval, info.nominal_interval) == (0.1, pytest.approx(0.636)), "six files"


def test_what_the_chip_cannot_tell_is_known_by_its_shunt(tree):
    """80 uV and 40 uV across 5 milliohm at 5 V. A rail whose shunt is not told has no figure."""
    write(tree / HWMON / "shunt2_resistor", 10_000)
    (tree / HWMON / "shunt3_resistor").unlink()
    accuracy = open_stream("ina3221", 0.1, tree).info.accuracy
    assert accuracy == {
        "VDD_IN": Accuracy(pytest.approx(0.08), pytest.approx(0.04), pytest.approx(0.0016)),
        "VDD_CPU_GPU_CV": Accuracy(pytest.approx(0.04), pytest.approx(0.02), pytest.approx(0.0016)),
    }
    assert accuracy["VDD_IN"].resolution(18.95) == pytest.approx((0.04 + 18.95 * 8 / 5000) / 2)


def test_a_counter_is_read_once_an_interval(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(polled, "time", clock)
    reader = Rippling(clock, 10, "sine", 0.0)
    reader.quantity = "joules"
    stream = PolledStream(reader, 0.1)
    times = [stream.next(1).time for _ in range(11)]
    assert times[-1] - times[0] == pytest.approx(1.0)


def test_a_polled_source_that_fails_for_long_is_lost(monkeypatch):
    monkeypatch.setattr("cdkd_edge.board.power.polled.PATIENCE", 0.1)
    reader = Slow()
    stream = PolledStream(reader, 0.02)
    stream.next(1)
    reader.read = lambda: (_ for _ in ()).throw(OSError("gone"))
    assert stream.next(1) == "gone"
    time.sleep(0.15)
    with pytest.raises(LostSourceError, match="gone"):
        stream.next(1)


def test_a_source_that_does_not_exist(tmp_path):
    with pytest.raises(UnusableSourceError, match="no source named wattmeter"):
        open_stream("wattmeter", 0.1, tmp_path)
