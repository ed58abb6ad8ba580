package spec

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
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

// DefaultSeccomp is docker's profile for a container with these capabilities, without the x32 ABI.
//
// The runtime compiles the profile at each start of a container, rule by rule and for each architecture. That takes longer than all else
// that runc does. A third of it is for x32, which kernels of distributions have disabled: a process that calls it is killed.
func DefaultSeccomp(caps []string) (*specs.LinuxSeccomp, error) {
	p, err := seccomp.GetDefaultProfile(bounded(caps))
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	p.Architectures = slices.DeleteFunc(p.Architectures, func(a specs.Arch) bool { return a == specs.ArchX32 })
	p.Syscalls = joinRules(p.Syscalls)
	return p, nil
}

// joinRules makes fewer rules of those that compare one argument of one call with several values, and otherwise are the same. Two
// whose values differ in a single bit become one that ignores that bit.
func joinRules(rules []specs.LinuxSyscall) []specs.LinuxSyscall {
	for i := 0; i < len(rules); i++ {
		for j := i + 1; j < len(rules); j++ {
			if arg, ok := joined(&rules[i], &rules[j]); ok {
				rules[i].Args, rules = []specs.LinuxSeccompArg{arg}, slices.Delete(rules, j, j+1)
				i = -1 // the new rule may be joined with an earlier one
				break
			}
		}
	}
	return rules
}

// joined returns the condition that holds where that of a or that of b does, if a masked comparison can express it.
func joined(a, b *specs.LinuxSyscall) (arg specs.LinuxSeccompArg, ok bool) {
	if len(a.Args) != 1 || len(b.Args) != 1 || len(a.Names) != 1 || !slices.Equal(a.Names, b.Names) ||
		a.Action != b.Action || a.ErrnoRet != b.ErrnoRet || a.Args[0].Index != b.Args[0].Index {
		return arg, false
	}
	mask, value, ok := masked(a.Args[0])
	mask2, value2, ok2 := masked(b.Args[0])
	differ := value ^ value2
	if !ok || !ok2 || mask != mask2 || bits.OnesCount64(differ) != 1 {
		return arg, false
	}
	return specs.LinuxSeccompArg{Index: a.Args[0].Index, Op: specs.OpMaskedEqual, Value: mask &^ differ, ValueTwo: value &^ differ}, true
}

// masked returns a condition as a comparison of some of the bits.
func masked(arg specs.LinuxSeccompArg) (mask, value uint64, ok bool) {
	switch arg.Op {
	case specs.OpEqualTo:
		return ^uint64(0), arg.Value, true
	case specs.OpMaskedEqual:
		return arg.Value, arg.ValueTwo, true
	}
	return 0, 0, false
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
