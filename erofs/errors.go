package erofs

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

func refused(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// tooMuch returns the error for a layer that exceeds a limit set by the caller or the format.
func tooMuch(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}
