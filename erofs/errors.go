package erofs

import (
	"errors"

	"distkit/errclass"

	"github.com/containerd/errdefs"
)

var errMissing = errors.New("no such file")

func refused(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// tooMuch is for what exceeds a limit of the caller's.
func tooMuch(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}
