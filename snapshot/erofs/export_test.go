package erofs

import (
	"distkit/snapshot/internal/overlay"

	"golang.org/x/sys/unix"
)

// RefuseDetached makes overlays fail on an image that has no place in the tree, as kernels before 6.15 do, until what it returns is
// called.
func RefuseDetached() (end func()) {
	was := onDetached
	onDetached = func(overlay.Layers, func(overlay.Layers) error) error { return unix.EINVAL }
	return func() { onDetached = was }
}
