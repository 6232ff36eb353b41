"""The model.py of a model repository, which is copied there as it is and has to say clearly what it lacks."""

import triton_python_backend_utils as pb_utils

try:
    from v4export.errors import V4Error
    from v4export.serve.model import Model
except ImportError as error:
    # The backend's own exceptions are not there yet.
    raise ImportError(
        f"this model needs v4export in the server's Python: pip install 'v4export[cpu]' or 'v4export[gpu]' ({error})"
    ) from error


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        """Load the bundle that lies beside this file."""
        try:
            self._model = Model(pb_utils, args)
        except V4Error as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests):
        """Answers are sent later."""
        return self._model.execute(requests)

    def finalize(self):
        """End what is on its way."""
        self._model.finalize()
