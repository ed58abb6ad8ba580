package runtime

import (
	"encoding/json"
	"fmt"
	"io"
	goruntime "runtime"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// seccompProfile is docker's form of a profile, of which the runtime specification's own
// linux.seccomp is a subset.
type seccompProfile struct {
	specs.LinuxSeccomp
	ArchMap []struct {
		Architecture     specs.Arch
		SubArchitectures []specs.Arch
	}
	Syscalls []struct {
		specs.LinuxSyscall
		Name     string
		Includes seccompFilter
		Excludes seccompFilter
	} `json:"syscalls"` // not the embedded one of that name
}

type seccompFilter struct {
	Caps      []string
	Arches    []string
	MinKernel string
}

// seccompArches are the kernel's names of this build's architecture.
var seccompArches = map[string]struct {
	docker string
	native specs.Arch
}{
	"amd64": {"amd64", specs.ArchX86_64},
	"arm64": {"arm64", specs.ArchAARCH64},
}

// ReadSeccomp reads a seccomp profile in docker's form or as the runtime specification has it
// in linux.seccomp. Rules for other architectures, and those for capabilities that the
// container doesn't have (caps is what it has), are left out; a rule for a kernel newer than
// some version is taken, since the kernel refuses what it doesn't know.
func ReadSeccomp(r io.Reader, caps []string) (*specs.LinuxSeccomp, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxDocument))
	if err != nil {
		return nil, fmt.Errorf("read seccomp profile: %w", err)
	}
	var p seccompProfile
	if err := json.Unmarshal(b, &p); err != nil {
		return nil, invalid("seccomp profile: %v", err)
	}
	if p.DefaultAction == "" {
		return nil, invalid("seccomp profile: defaultAction is missing")
	}
	arch := seccompArches[goruntime.GOARCH]
	out := p.LinuxSeccomp
	for _, m := range p.ArchMap {
		if m.Architecture == arch.native {
			out.Architectures = append([]specs.Arch{m.Architecture}, m.SubArchitectures...)
		}
	}
	has := func(cap string) bool { return slices.Contains(caps, cap) }
	for _, s := range p.Syscalls {
		switch {
		case len(s.Includes.Arches) > 0 && !slices.Contains(s.Includes.Arches, arch.docker),
			slices.Contains(s.Excludes.Arches, arch.docker),
			slices.ContainsFunc(s.Includes.Caps, func(c string) bool { return !has(c) }),
			slices.ContainsFunc(s.Excludes.Caps, has):
			continue
		}
		call := s.LinuxSyscall
		if s.Name != "" {
			call.Names = append(call.Names, s.Name)
		}
		if len(call.Names) == 0 {
			return nil, invalid("seccomp profile: a rule names no system call")
		}
		out.Syscalls = append(out.Syscalls, call)
	}
	return &out, nil
}
