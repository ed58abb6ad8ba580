// Package layer reads layers, the tar archives of the image specification's "Image Layer Filesystem Changeset", for the packages that
// make something of their entries. It knows what names and records of an archive mean, but no file system.
package layer

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

func dataLoss(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}

func refused(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// tooMuch is for a layer that exceeds a limit of the caller's.
func tooMuch(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}
