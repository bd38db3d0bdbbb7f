"""Where layer-to-layer training keeps weights, gradients and optimizer states: away from the device that computes."""

from graphopt.runtime.stores.disk_store import DiskStore as DiskStore
from graphopt.runtime.stores.host_store import HostStore as HostStore
from graphopt.runtime.stores.loads import TensorInfo as TensorInfo
from graphopt.runtime.stores.store import Store as Store
from graphopt.runtime.stores.store import Visit as Visit
from graphopt.runtime.stores.stored_tensor import StoredTensor as StoredTensor
