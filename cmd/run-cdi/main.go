// Command run-cdi gives devices of the Container Device Interface to the container of a runtime specification.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/disk/sys"
	"distkit/errclass"
	"distkit/runtime/spec"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "run-cdi [flags] VENDOR/CLASS=NAME…",
		Short: "add CDI devices to an OCI runtime spec",
		Args:  cobra.ArbitraryArgs,
	}
	r := cli.NewRecords(c, "DEVICE", "FILE")
	dirs := c.Flags().StringArray("cdi-dir", cdiDirs(), "the `DIR` of the devices' descriptions; those of a later one go before (can be repeated; env DIST_CDI_DIRS)")
	list := c.Flags().BoolP("list", "l", false, "list the devices that there are")
	c.RunE = func(c *cobra.Command, args []string) error {
		if *list && len(args) > 0 {
			return cli.Usagef("--list takes no device")
		}
		for _, name := range args {
			if _, _, _, err := parser.ParseQualifiedName(name); err != nil {
				return cli.Usagef("%w", err)
			}
		}
		cache, err := open(*dirs)
		if err != nil {
			return err
		}
		if *list {
			for _, name := range cache.ListDevices() {
				if err := r.Write(map[string]string{"device": name, "file": cache.GetDevice(name).GetSpec().GetPath()}, name, cache.GetDevice(name).GetSpec().GetPath()); err != nil {
					return err
				}
			}
			return errors.Join(r.Close(), problems(cache))
		}
		in, err := cli.Stdin(c.Context())
		if err != nil {
			return err
		}
		defer in.Close()
		s, err := read(in)
		if err != nil {
			return err
		}
		for i, name := range args {
			if cache.GetDevice(name) == nil {
				return missing(cache, name, *dirs)
			}
			if slices.Contains(args[:i], name) {
				return cli.Usagef("device %s is given twice", name)
			}
		}
		if _, err := cache.InjectDevices(s, args...); err != nil {
			return errclass.As(err, errdefs.ErrFailedPrecondition) // a description is invalid, or the host lacks a device that it names
		}
		e := json.NewEncoder(c.OutOrStdout())
		e.SetIndent("", "\t")
		e.SetEscapeHTML(false)
		return e.Encode(s)
	}
	return c
}

// cdiDirs returns the default directories.
func cdiDirs() []string {
	if dirs := os.Getenv("DIST_CDI_DIRS"); dirs != "" {
		return filepath.SplitList(dirs)
	}
	return cdi.DefaultSpecDirs
}

// read reads a specification. Unknown fields are an error, since they would be lost.
func read(in io.Reader) (*specs.Spec, error) {
	b, err := io.ReadAll(io.LimitReader(in, spec.MaxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(b) > spec.MaxDocument {
		return nil, cli.Usagef("runtime spec is larger than %d bytes", spec.MaxDocument)
	}
	s := &specs.Spec{}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(s); err != nil {
		return nil, cli.Usagef("runtime spec: %w", err)
	}
	if s.Version == "" {
		return nil, cli.Usagef("this is not a runtime spec: it has no ociVersion")
	}
	return s, nil
}

// open reads the descriptions in the directories. They decide what is mounted, and what is executed as this user. So
// each file and its directory must belong to root or this user, and nobody else may write to them.
func open(dirs []string) (*cdi.Cache, error) {
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = trusted(dir, unix.S_IFDIR)
		}
		for _, e := range entries {
			if ext := filepath.Ext(e.Name()); err == nil && (ext == ".json" || ext == ".yaml") && !e.IsDir() {
				err = trusted(filepath.Join(dir, e.Name()), unix.S_IFREG)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return cdi.NewCache(cdi.WithSpecDirs(dirs...), cdi.WithAutoRefresh(false))
}

// trusted returns an error if the file is of another type, or if others may change it.
func trusted(name string, kind uint32) error {
	const overflow = 65534 // root's ID as seen from a user namespace
	var st unix.Stat_t
	switch err := unix.Stat(name, &st); {
	case err != nil:
		return fmt.Errorf("%s: %w", name, err)
	case st.Mode&unix.S_IFMT != kind:
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is not a regular file", name)
	case st.Size > spec.MaxDocument && kind == unix.S_IFREG:
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "%s is larger than %d bytes", name, spec.MaxDocument)
	case st.Mode&0o022 != 0, st.Uid != 0 && int(st.Uid) != os.Geteuid() && (st.Uid != overflow || !sys.InUserNamespace()):
		return errclass.Errorf(errdefs.ErrPermissionDenied, "%s can be changed by others than root and this user: it could have anything run", name)
	}
	return nil
}

// missing returns the error for a device that no description has.
func missing(cache *cdi.Cache, name string, dirs []string) error {
	if err := problems(cache); err != nil {
		return errclass.Errorf(errdefs.ErrFailedPrecondition, "device %s: %w", name, err)
	}
	return errclass.Errorf(errdefs.ErrNotFound, "no device %s in %s", name, strings.Join(dirs, ", "))
}

// problems returns an error about the descriptions that could not be used.
func problems(cache *cdi.Cache) error {
	texts := map[string]bool{} // a conflict is reported for each of its files
	for file, errs := range cache.GetErrors() {
		for _, err := range errs {
			text := err.Error()
			if !strings.Contains(text, file) {
				text = file + ": " + text
			}
			texts[text] = true
		}
	}
	if len(texts) == 0 {
		return nil
	}
	return errclass.Errorf(errdefs.ErrFailedPrecondition, "%s", strings.Join(slices.Sorted(maps.Keys(texts)), "; "))
}
