"""Pictures: detections beside the truth, attended boxes, curves of training logs."""
