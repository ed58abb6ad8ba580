package spec

import (
	"slices"
	"strings"

	"distkit/errclass"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// unconfined is docker's and the kernel's name for having no AppArmor profile.
const unconfined = "unconfined"

// labelSecurity sets the AppArmor profile and the SELinux labels. ErrNotImplemented: the host does not have the
// security module. FailedPrecondition: the profile is not loaded. InvalidArgument: a malformed label.
func (o *Options) labelSecurity(s *specs.Spec) error {
	if o.AppArmor != "" && o.AppArmor != unconfined {
		if err := CheckText("AppArmor profile", o.AppArmor); err != nil {
			return err
		}
		if !o.Host.AppArmor {
			return errclass.Errorf(errdefs.ErrNotImplemented, "AppArmor profile %q: AppArmor is not enabled on this host", o.AppArmor)
		}
		if o.Host.Profiles != nil && !slices.Contains(o.Host.Profiles, o.AppArmor) {
			return failed("AppArmor profile %q is not loaded: load it with apparmor_parser", o.AppArmor)
		}
		s.Process.ApparmorProfile = o.AppArmor
	}
	for _, label := range []string{o.SELinuxLabel, o.SELinuxMountLabel} {
		if label == "" {
			continue
		}
		if err := CheckText("SELinux label", label); err != nil {
			return err
		}
		if f := strings.SplitN(label, ":", 4); len(f) < 3 || f[0] == "" || f[1] == "" || f[2] == "" || strings.ContainsAny(label, " \t\n\"") {
			return invalid("SELinux label %q is not USER:ROLE:TYPE[:LEVEL]", label)
		}
		if !o.Host.SELinux {
			return errclass.Errorf(errdefs.ErrNotImplemented, "SELinux label %q: SELinux is not enabled on this host", label)
		}
	}
	s.Process.SelinuxLabel, s.Linux.MountLabel = o.SELinuxLabel, o.SELinuxMountLabel
	return nil
}
