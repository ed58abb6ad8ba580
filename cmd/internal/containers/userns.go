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

// Join moves an ordinary user's process into the user namespace of the container, by executing it again there. In that
// namespace the process may do what root may. If this is not needed, Join returns.
func Join(c *runtime.Container) error {
	if os.Geteuid() == 0 {
		return nil
	}
	ns, err := c.UserNamespace()
	if ns == nil || err != nil {
		return err
	}
	// A descriptor stands for this very namespace; a process number may be reused.
	if _, err := unix.FcntlInt(ns.Fd(), unix.F_SETFD, 0); err != nil {
		return err
	}
	return become("nsenter", fmt.Sprintf("--user=/proc/self/fd/%d", ns.Fd()), "--preserve-credentials", "--")
}

// BeRoot makes an ordinary user's process root of a new user namespace, in the same way.
func BeRoot() error {
	if os.Geteuid() == 0 {
		return nil
	}
	return become("dist-userns", "--")
}

// become executes this program again, by another program that comes before its arguments.
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
	// Paths must not change together with the user.
	env := os.Environ()
	if os.Getenv("DIST_STATE") == "" {
		env = append(env, "DIST_STATE="+runtime.DefaultState())
	}
	args = append(append([]string{by}, args...), self)
	return fmt.Errorf("%s: %w", by, unix.Exec(path, append(args, os.Args[1:]...), env))
}
