// Package errclass gives errors a class and maps each class to an exit status, the same one in every command.
//
// The classes are those of github.com/containerd/errdefs, such as errdefs.ErrNotFound. [As] and [Errorf] add a class
// without adding its text to the message: errors.Is finds the class, and the user reads one plain line. [Status] turns
// an error into the exit status of a command. [Remote] is the inverse: it turns the exit status and the last line of
// another program, which serves one of our protocols, into an error of the same class.
//
// The package is a leaf: it imports no other package of distkit.
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

// As returns err with the given classes. Its text is that of err; errors.Is matches the classes and everything that err
// wraps.
func As(err error, classes ...error) error { return classed{err, classes} }

// Errorf returns an error with the text of fmt.Errorf and the given class. Like fmt.Errorf it wraps the operands of %w.
func Errorf(class error, format string, a ...any) error { return As(fmt.Errorf(format, a...), class) }

type classed struct {
	error
	classes []error
}

func (c classed) Unwrap() []error { return append([]error{c.error}, c.classes...) }

// Status returns the exit status for an error: 0 for nil, 1 for an error without a class. DataLoss wins over the other
// classes, because a digest mismatch is FailedPrecondition too.
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

// classes maps an exit status back to a class.
var classes = map[int]error{
	2: errdefs.ErrInvalidArgument, 3: errdefs.ErrNotFound, 4: errdefs.ErrDataLoss, 5: errdefs.ErrUnavailable, 6: errdefs.ErrAborted,
	7: errdefs.ErrAlreadyExists, 8: errdefs.ErrFailedPrecondition, 9: errdefs.ErrUnauthenticated, 10: errdefs.ErrNotImplemented,
}

// Remote returns an error with the given text for a program that exited with status. It has the class of that status,
// or no class if the status stands for none.
func Remote(status int, text string) error {
	err := errors.New(text)
	if class := classes[status]; class != nil {
		return As(err, class)
	}
	return err
}

// OneLine returns text in a form that is safe for one line on a terminal: without space at its ends, a newline becomes
// "; ", and any other unprintable character becomes an escape such as \x1b.
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
