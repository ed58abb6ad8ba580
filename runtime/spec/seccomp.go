package spec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ReadSeccomp reads a seccomp profile in docker's form or as the runtime specification has it
// in linux.seccomp. Rules for other architectures, for newer kernels, and for capabilities that
// the container doesn't have (caps is what it has), are left out. InvalidArgument for what is no
// profile.
func ReadSeccomp(r io.Reader, caps []string) (*specs.LinuxSeccomp, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxDocument))
	if err != nil {
		return nil, fmt.Errorf("read seccomp profile: %w", err)
	}
	p, err := seccomp.LoadProfile(string(b), bounded(caps))
	switch {
	case err != nil:
		return nil, invalid("seccomp profile: %v", err)
	case p == nil || p.DefaultAction == "":
		return nil, invalid("seccomp profile: defaultAction is missing")
	case slices.ContainsFunc(p.Syscalls, func(s specs.LinuxSyscall) bool { return len(s.Names) == 0 }):
		return nil, invalid("seccomp profile: a rule names no system call")
	}
	return p, nil
}

// DefaultSeccomp is docker's profile for a container with these capabilities.
func DefaultSeccomp(caps []string) (*specs.LinuxSeccomp, error) {
	p, err := seccomp.GetDefaultProfile(bounded(caps))
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	return p, nil
}

// seccomp is the filter for a container with these capabilities; nil filters nothing.
func (o *Options) seccomp(caps []string) (*specs.LinuxSeccomp, error) {
	mode := o.Seccomp
	switch {
	case mode == "" && o.Privileged:
		mode = "unconfined"
	case mode == "":
		mode = "default"
	}
	switch mode {
	case "unconfined":
		return nil, nil
	case "default":
		return DefaultSeccomp(caps)
	}
	f, err := os.Open(mode)
	if errors.Is(err, fs.ErrNotExist) {
		err = errclass.As(err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	defer f.Close()
	return ReadSeccomp(f, caps)
}

func bounded(caps []string) *specs.Spec {
	return &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{Bounding: caps}}}
}
