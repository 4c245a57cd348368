"""Weight decay by the type of the module and rates by its name, both at once.

What detectron2 projects do (AutoFocusFormer's and Mask2Former's ``train_net.py``, ``build_optimizer``).  mmengine's
default constructor ignores ``norm_decay_mult`` wherever one of the ``custom_keys`` matches, so that a slower backbone
without decay of its norms needs a key for every norm.
"""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from torch import nn

from boltz_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

_NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KEYS = frozenset({'custom_keys', 'norm_decay_mult', 'embed_decay_mult'})


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ModuleTypeOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """One group for each parameter; its rate and its decay are products of all rules that apply.

    ::

        optim_wrapper = dict(
            constructor='boltz_mm.ModuleTypeOptimWrapperConstructor',
            paramwise_cfg=dict(
                norm_decay_mult=0.0, embed_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.1))),
            ...)

    ``paramwise_cfg`` knows ``norm_decay_mult`` (parameters that belong to a norm layer), ``embed_decay_mult`` (those of
    ``nn.Embedding``) and ``custom_keys``: by text that occurs in the path of the module that holds the parameter,
    ``lr_mult`` and ``decay_mult``.  A parameter that several modules share counts once, by the first of them; one
    without gradient is left out.

    Raises:
        ValueError: ``paramwise_cfg`` has another key, or the optimizer has no ``lr`` or no ``weight_decay``.
    """

    def _validate_cfg(self) -> None:
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(f'the optimizer needs lr and weight_decay, got {self.optimizer_cfg}')
        super()._validate_cfg()
        unknown = set(self.paramwise_cfg) - _KEYS
        if unknown:
            raise ValueError(f'unknown key {min(unknown)!r} in paramwise_cfg, known are {sorted(_KEYS)}')
        for key, rule in self.paramwise_cfg.get('custom_keys', {}).items():
            if set(rule) - {'lr_mult', 'decay_mult'}:
                raise ValueError(f'custom_keys[{key!r}] knows lr_mult and decay_mult, got {rule}')

    def add_params(
        self, params: list[dict[str, Any]], module: nn.Module, prefix: str = '', is_dcn_module: Any = None
    ) -> None:
        """Add the groups of ``module``, in the order of ``named_modules``.

        Args:
            params: The groups; new ones are appended.
            module: The model or a part of it.
            prefix: Path of ``module`` in the model.
            is_dcn_module: Of no use here.
        """
        seen = {id(parameter) for group in params for parameter in group['params']}
        for path, part in module.named_modules(prefix=prefix):
            lr_mult, decay_mult = self._multipliers(path, part)
            for parameter in part.parameters(recurse=False):
                if parameter.requires_grad and id(parameter) not in seen:
                    seen.add(id(parameter))
                    rates = {'lr': self.base_lr * lr_mult, 'weight_decay': self.base_wd * decay_mult}
                    params.append({'params': [parameter], **rates})

    def _multipliers(self, path: str, module: nn.Module) -> tuple[float, float]:
        lr_mult, decay_mult = 1.0, 1.0
        if isinstance(module, _NORMS):
            decay_mult *= self.paramwise_cfg.get('norm_decay_mult', 1.0)
        elif isinstance(module, nn.Embedding):
            decay_mult *= self.paramwise_cfg.get('embed_decay_mult', 1.0)
        for key, rule in self.paramwise_cfg.get('custom_keys', {}).items():
            if key in path:
                lr_mult *= rule.get('lr_mult', 1.0)
                decay_mult *= rule.get('decay_mult', 1.0)
        return lr_mult, decay_mult
