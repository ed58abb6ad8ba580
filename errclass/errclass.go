// Package errclass gives an error one of the classes of github.com/containerd/errdefs, without adding the class's words
// to its text, and knows which exit status each class has in every command.
package errclass

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"syscall"
	"unicode"

	"github.com/containerd/errdefs"
)

// As returns err with these classes: errors.Is finds them, and all that err wraps.
func As(err error, classes ...error) error { return classed{err, classes} }

// Errorf is As of fmt.Errorf.
func Errorf(class error, format string, a ...any) error { return As(fmt.Errorf(format, a...), class) }

type classed struct {
	error
	classes []error
}

func (c classed) Unwrap() []error { return append([]error{c.error}, c.classes...) }

// Status returns the exit status of an error's class: 0 for nil, 1 for an error without a class.
func Status(err error) int {
	switch {
	case err == nil:
		return 0
	case errdefs.IsDataLoss(err):
		return 4
	case errdefs.IsInvalidArgument(err):
		return 2
	case errdefs.IsNotFound(err):
		return 3
	case errdefs.IsUnavailable(err):
		return 5
	case errdefs.IsAborted(err), errdefs.IsDeadlineExceeded(err), errdefs.IsResourceExhausted(err):
		return 6
	case errdefs.IsAlreadyExists(err):
		return 7
	case errdefs.IsFailedPrecondition(err):
		return 8
	case errdefs.IsUnauthorized(err), errdefs.IsPermissionDenied(err),
		errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return 9
	case errdefs.IsNotImplemented(err):
		return 10
	}
	return 1
}

// classes are those that a program's exit status stands for.
var classes = map[int]error{
	2: errdefs.ErrInvalidArgument, 3: errdefs.ErrNotFound, 4: errdefs.ErrDataLoss, 5: errdefs.ErrUnavailable, 6: errdefs.ErrAborted,
	7: errdefs.ErrAlreadyExists, 8: errdefs.ErrFailedPrecondition, 9: errdefs.ErrUnauthenticated, 10: errdefs.ErrNotImplemented,
}

// Remote returns the error of a program that failed with a status and said why. It has the class of the status, none
// for a status without one.
func Remote(status int, text string) error {
	err := errors.New(text)
	if class := classes[status]; class != nil {
		return As(err, class)
	}
	return err
}

// OneLine returns text without what would break a line or drive a terminal. A newline becomes "; ", and every other
// character that is not printable becomes an escape.
func OneLine(s string) string {
	s = strings.TrimSpace(s)
	if strings.IndexFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\n':
			b.WriteString("; ")
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, "\\x%02x", r)
		}
	}
	return b.String()
}
