package errclass

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/containerd/errdefs"
)

func TestAs(t *testing.T) {
	err := fmt.Errorf("outer: %w", As(fmt.Errorf("inner: %w", io.EOF), errdefs.ErrDataLoss, errdefs.ErrFailedPrecondition))
	if err.Error() != "outer: inner: EOF" {
		t.Errorf("text %q", err)
	}
	if !errdefs.IsDataLoss(err) || !errdefs.IsFailedPrecondition(err) || !errors.Is(err, io.EOF) || errdefs.IsNotFound(err) {
		t.Errorf("classes of %v", err)
	}
	if err := Errorf(errdefs.ErrNotFound, "no %s", "x"); err.Error() != "no x" || !errdefs.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}

// The class that a program's exit status stands for has that status.
func TestRemote(t *testing.T) {
	for status := range 12 {
		err := Remote(status, "text")
		want := status
		if status < 2 || status > 10 {
			want = 1
		}
		if got := Status(err); got != want || err.Error() != "text" {
			t.Errorf("%d became %d: %v", status, got, err)
		}
	}
}
