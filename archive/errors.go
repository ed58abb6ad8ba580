package archive

import (
	"fmt"

	"distkit/errclass"

	"github.com/containerd/errdefs"
)

func dataLoss(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}

func invalid(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// overLimit returns the error for a layer that exceeds a limit of the caller.
func overLimit(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}

// quote quotes a name for an error message, and shortens it.
func quote(name string) string {
	const most = 200
	if len(name) > most {
		return fmt.Sprintf("%q…", name[:most])
	}
	return fmt.Sprintf("%q", name)
}
