package archive

import (
	"fmt"

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

// quote shows a name in an error, cut to a length that can be read.
func quote(name string) string {
	const most = 200
	if len(name) > most {
		return fmt.Sprintf("%q…", name[:most])
	}
	return fmt.Sprintf("%q", name)
}
