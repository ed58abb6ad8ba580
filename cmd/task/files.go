package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	"distkit/archive"
	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/containers"
	"distkit/errclass"
	"distkit/runtime"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

func newTar(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "tar ID PATH", Short: "write a container's file or directory as a tar archive", Args: cobra.ExactArgs(2)}
	insideFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return files(c, o, args, func(root *os.File) error {
			opts := archive.DiffOptions{Archive: true, Compression: archive.Uncompressed}
			dir, base := path.Split(args[1])
			if base == "." || base == ".." {
				dir, base = args[1], ""
			}
			if base != "" {
				opts.Only = []string{base}
			}
			d, err := openDir(root, dir)
			if err != nil {
				return err
			}
			defer d.Close()
			if base != "" {
				var st unix.Stat_t
				if err := unix.Fstatat(int(d.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
					return inContainer(args[1], err)
				}
			}
			_, err = archive.Diff(c.Context(), c.OutOrStdout(), "", procPath(d), opts)
			return err
		})
	}
	return c
}

func newUntar(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "untar ID DIR", Short: "write the files of a tar archive into a container's directory", Args: cobra.ExactArgs(2)}
	insideFlag(c)
	c.RunE = func(c *cobra.Command, args []string) error {
		return files(c, o, args, func(root *os.File) error {
			in, err := cli.LayerStdin(c.Context())
			if err != nil {
				return err
			}
			defer in.Close()
			d, err := openDir(root, args[1])
			if err != nil {
				return err
			}
			d.Close()
			r, err := archive.Apply(c.Context(), procPath(root), in, archive.Options{Archive: true, Below: args[1]})
			if err == nil && len(r.Unset) > 0 {
				cli.Report(c, fmt.Errorf("could not set %s", cli.Counts(r.Unset)))
			}
			return err
		})
	}
	return c
}

func insideFlag(c *cobra.Command) {
	c.Flags().Uint("inside", 0, "")
	_ = c.Flags().MarkHidden("inside")
}

// files calls f with a container's root directory. If the container has its own user namespace, another process does
// that there. It inherits the directory as the descriptor in --inside.
func files(c *cobra.Command, o *containers.Flags, args []string, f func(root *os.File) error) error {
	if fd, _ := c.Flags().GetUint("inside"); fd > 0 {
		return f(os.NewFile(uintptr(fd), "root"))
	}
	t, err := join(o, args[0])
	if err == nil {
		err = containers.BeRoot()
	}
	if err != nil {
		return err
	}
	return t.Files(c.Context(), func(fs runtime.Files) error {
		if fs.Users == nil {
			return f(fs.Root)
		}
		return inside(c, fs, args)
	})
}

// inside runs the verb again, as root of the container's user namespace.
func inside(c *cobra.Command, fs runtime.Files, args []string) error {
	name, err := os.Executable()
	if err != nil {
		return err
	}
	self, err := os.Open(name) // that root may have no search permission for the path
	if err != nil {
		return err
	}
	defer self.Close()
	enter := exec.CommandContext(c.Context(), "nsenter", append([]string{"--user=/proc/self/fd/3", "/proc/self/fd/5", c.Name(), "--inside=4", "--"}, args...)...)
	enter.ExtraFiles = []*os.File{fs.Users, fs.Root, self}
	enter.Stdin, enter.Stdout, enter.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = enter.Run()
	var exit *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return errclass.Errorf(errdefs.ErrNotImplemented, "nsenter is not installed, which enters the container's user namespace")
	case c.Context().Err() != nil:
		return c.Context().Err()
	case errors.As(err, &exit) && exit.Exited():
		return cli.Exit(exit.ExitCode()) // it has reported the error
	}
	return err
}

// openDir opens a container's directory. No symbolic link leads out of the root.
func openDir(root *os.File, name string) (*os.File, error) {
	d, err := spec.OpenInRoot(root, path.Join("/", name))
	if err != nil {
		return nil, inContainer(name, err)
	}
	if info, err := d.Stat(); err != nil || !info.IsDir() {
		d.Close()
		return nil, inContainer(name, errors.Join(err, unix.ENOTDIR))
	}
	return d, nil
}

// inContainer returns the error for a path in a container.
func inContainer(name string, err error) error {
	err = fmt.Errorf("%s in the container: %w", name, err)
	switch {
	case errors.Is(err, unix.ENOENT):
		return errclass.As(err, errdefs.ErrNotFound)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return errclass.As(err, errdefs.ErrPermissionDenied)
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		return errclass.As(err, errdefs.ErrInvalidArgument)
	}
	return err
}

func procPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

func newVolumes(o *containers.Flags) *cobra.Command {
	c := &cobra.Command{Use: "volumes [flags] [NAME…|-]", Short: "list volumes and the containers that use them, or remove some", Args: cobra.ArbitraryArgs}
	r := cli.NewRecords(c, "VOLUME", "CONTAINERS")
	remove := c.Flags().Bool("rm", false, "remove the volumes NAME with their files")
	c.RunE = func(c *cobra.Command, args []string) error {
		all, err := o.Open()
		if err != nil {
			return err
		}
		if *remove {
			if err := containers.BeRoot(); err != nil { // its files may belong to other users
				return err
			}
			return cli.Each(c, args, func(name string) error { return all.RemoveVolume(c.Context(), name) })
		}
		list, lerr := all.Volumes()
		write := func(v runtime.Volume) error { return r.Write(v, v.Name, strings.Join(v.Containers, ",")) }
		if len(args) == 0 {
			for _, v := range list {
				if err := write(v); err != nil {
					return err
				}
			}
			return errors.Join(lerr, r.Close())
		}
		err = cli.Each(c, args, func(name string) error {
			i := slices.IndexFunc(list, func(v runtime.Volume) bool { return v.Name == name })
			if i < 0 {
				return errclass.Errorf(errdefs.ErrNotFound, "no volume %s", name)
			}
			return write(list[i])
		})
		return errors.Join(lerr, err, r.Close())
	}
	return c
}
