# The default runtime for configs of mmseg's scope, counted in updates.
_base_ = './iter_runtime.py'

default_scope = 'mmseg'
default_hooks = dict(visualization=dict(_delete_=True, type='SegVisualizationHook'))
visualizer = dict(
    _delete_=True, type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer'
)
