"""What the interpreter reports: each kind of defect is a class of its own."""


class SimulationError(Exception):
    """A defect of the kernel, or something that the interpreter does not know."""


class UnsupportedInstructionError(SimulationError):
    """An instruction or modifier that the interpreter does not implement."""


class OutOfBoundsError(SimulationError):
    """An address outside every buffer that the launch was given."""


class MisalignedError(SimulationError):
    """An address that is no multiple of the width of the access."""


class UninitialisedReadError(SimulationError):
    """A read of memory that nobody wrote."""


class AsyncCopyError(SimulationError):
    """A touch of the target of a cp.async before the wait that lets it land."""


class MissingLanesError(SimulationError):
    """A warp operation without all the lanes that it names."""


class DivergentBarrierError(SimulationError):
    """A barrier that only a part of a warp, or of the block, reaches."""


class RaceError(SimulationError):
    """Two accesses to one place, at least one a write, with nothing that orders them."""


class DeadlockError(SimulationError):
    """No warp can go on."""
