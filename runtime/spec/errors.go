package spec

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

func invalid(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

func notFound(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrNotFound, format, a...)
}

func failed(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}
