# Names without prefix are mmdet's (so that its inferencer, tools and tutorials apply), ours begin with boltz_mm.
default_scope = 'mmdet'
# boltz_mm.engine makes mmengine read checkpoints without running what is in them (mmdet's inferencer reads them first).
custom_imports = dict(imports=['boltz_mm', 'boltz_mm.engine'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='boltz_mm.AtomicCheckpointHook', interval=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='DetVisualizationHook'),
)

custom_hooks = [
    # Resuming continues the very run: random states, and the schedule of this config.
    dict(type='boltz_mm.RNGStateHook'),
    dict(type='boltz_mm.ScheduleRefreshHook'),
    # Steps without finite gradients are left out; training ends if the loss stays so.
    dict(type='boltz_mm.NonFiniteLossHook', patience=10),
    # SIGTERM, as job schedulers send it, saves and ends.
    dict(type='boltz_mm.SaveOnSignalHook'),
]

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='DetLocalVisualizer', vis_backends=vis_backends, name='visualizer')
log_processor = dict(type='LogProcessor', window_size=50, by_epoch=True)

log_level = 'INFO'
load_from = None
resume = False
