package containers

import (
	"fmt"
	"os"
	"os/exec"

	"distkit/cmd/internal/sibling"
	"distkit/errclass"
	"distkit/runtime"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Join makes an ordinary user's process, by executing it once more, one of the user namespace that the
// container was started from: there it may do to it what root may. Where it need not, it returns.
func Join(c *runtime.Container) error {
	if os.Geteuid() == 0 {
		return nil
	}
	ns, err := c.UserNamespace()
	if ns == nil || err != nil {
		return err
	}
	// The descriptor, unlike a process's number, can't become another's.
	if _, err := unix.FcntlInt(ns.Fd(), unix.F_SETFD, 0); err != nil {
		return err
	}
	return become("nsenter", fmt.Sprintf("--user=/proc/self/fd/%d", ns.Fd()), "--preserve-credentials", "--")
}

// BeRoot makes an ordinary user's process, in the same way, root of a user namespace of its own.
func BeRoot() error {
	if os.Geteuid() == 0 {
		return nil
	}
	return become("dist-userns", "--")
}

// become executes this program again, by another that comes before its arguments.
func become(by string, args ...string) error {
	name := sibling.Path(by)
	path, err := exec.LookPath(name)
	if err != nil {
		return errclass.Errorf(errdefs.ErrNotImplemented, "%s is not installed, by which an ordinary user works on containers", by)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// Where things are does not change with who one is.
	env := os.Environ()
	if os.Getenv("DIST_STATE") == "" {
		env = append(env, "DIST_STATE="+runtime.DefaultState())
	}
	args = append(append([]string{by}, args...), self)
	return fmt.Errorf("%s: %w", by, unix.Exec(path, append(args, os.Args[1:]...), env))
}
