package erofs

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

func refused(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// tooMuch is for what exceeds a limit of the caller's.
func tooMuch(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}
