"""The registries of the scope ``boltz_mm``: children of mmengine's roots.

A config of any OpenMMLab library reaches them with a prefix, ``type='boltz_mm.BoxeR'``; a config whose
``default_scope`` is ``'boltz_mm'`` needs none.  Each registry imports the package named in ``locations`` on its first
look-up, so that ``import boltz_mm`` stays light.
"""

from mmengine.registry import DATA_SAMPLERS as _MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as _MMENGINE_DATASETS
from mmengine.registry import HOOKS as _MMENGINE_HOOKS
from mmengine.registry import LOOPS as _MMENGINE_LOOPS
from mmengine.registry import METRICS as _MMENGINE_METRICS
from mmengine.registry import MODELS as _MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as _MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as _MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import PARAM_SCHEDULERS as _MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TASK_UTILS as _MMENGINE_TASK_UTILS
from mmengine.registry import TRANSFORMS as _MMENGINE_TRANSFORMS
from mmengine.registry import VISUALIZERS as _MMENGINE_VISUALIZERS
from mmengine.registry import Registry

_SCOPE = 'boltz_mm'


def _child(name: str, parent: Registry, location: str) -> Registry:
    return Registry(name, parent=parent, scope=_SCOPE, locations=[location])


MODELS = _child('model', _MMENGINE_MODELS, 'boltz_mm.models')
TASK_UTILS = _child('task util', _MMENGINE_TASK_UTILS, 'boltz_mm.models')
DATASETS = _child('dataset', _MMENGINE_DATASETS, 'boltz_mm.datasets')
DATA_SAMPLERS = _child('data sampler', _MMENGINE_DATA_SAMPLERS, 'boltz_mm.datasets')
TRANSFORMS = _child('transform', _MMENGINE_TRANSFORMS, 'boltz_mm.datasets')
METRICS = _child('metric', _MMENGINE_METRICS, 'boltz_mm.evaluation')
HOOKS = _child('hook', _MMENGINE_HOOKS, 'boltz_mm.engine')
LOOPS = _child('loop', _MMENGINE_LOOPS, 'boltz_mm.engine')
OPTIM_WRAPPERS = _child('optim_wrapper', _MMENGINE_OPTIM_WRAPPERS, 'boltz_mm.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(
    'optimizer wrapper constructor', _MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, 'boltz_mm.engine'
)
PARAM_SCHEDULERS = _child('parameter scheduler', _MMENGINE_PARAM_SCHEDULERS, 'boltz_mm.engine')
VISUALIZERS = _child('visualizer', _MMENGINE_VISUALIZERS, 'boltz_mm.visualization')
