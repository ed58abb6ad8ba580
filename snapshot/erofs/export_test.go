package erofs

import (
	"distkit/snapshot/internal/overlay"

	"golang.org/x/sys/unix"
)

// RefuseDetached makes overlays on detached images fail, as in kernels before 6.15, until end is called.
func RefuseDetached() (end func()) {
	was := onDetached
	onDetached = func(overlay.Layers, func(overlay.Layers) error) error { return unix.EINVAL }
	return func() { onDetached = was }
}
