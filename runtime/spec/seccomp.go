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

// ReadSeccomp reads a seccomp profile, in docker's format or in that of linux.seccomp in the runtime specification. It
// drops rules for other architectures, for newer kernels, and for capabilities that are not in caps, the container's.
// InvalidArgument: not a profile.
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

// DefaultSeccomp returns docker's profile for a container with these capabilities, without the x32 ABI.
//
// The runtime compiles the profile at each start of a container, rule by rule and architecture by architecture. In runc
// that takes longer than everything else. A third of it would be for x32, which distributions' kernels have disabled. A
// process that makes an x32 call is killed.
func DefaultSeccomp(caps []string) (*specs.LinuxSeccomp, error) {
	p, err := seccomp.GetDefaultProfile(bounded(caps))
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	p.Architectures = slices.DeleteFunc(p.Architectures, func(a specs.Arch) bool { return a == specs.ArchX32 })
	p.Syscalls = joinRules(p.Syscalls)
	return p, nil
}

// joinRules reduces the number of rules. It joins rules that compare one argument of a call with different values and
// are otherwise equal: if two values differ in a single bit, one rule that ignores that bit replaces both.
func joinRules(rules []specs.LinuxSyscall) []specs.LinuxSyscall {
	for i := 0; i < len(rules); i++ {
		for j := i + 1; j < len(rules); j++ {
			if arg, ok := joined(&rules[i], &rules[j]); ok {
				rules[i].Args, rules = []specs.LinuxSeccompArg{arg}, slices.Delete(rules, j, j+1)
				i = -1 // try to join the new rule with earlier ones
				break
			}
		}
	}
	return rules
}

// joined returns a condition that holds if a or b does. ok is false if no masked comparison can express it.
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

// masked returns a condition as a comparison of the bits in mask.
func masked(arg specs.LinuxSeccompArg) (mask, value uint64, ok bool) {
	switch arg.Op {
	case specs.OpEqualTo:
		return ^uint64(0), arg.Value, true
	case specs.OpMaskedEqual:
		return arg.Value, arg.ValueTwo, true
	}
	return 0, 0, false
}

// seccomp returns the filter for a container with these capabilities, or nil for none.
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
