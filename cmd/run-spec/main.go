// Command run-spec turns an image's configuration into a container's runtime specification.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"distkit/cmd/internal/cli"
	"distkit/runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() { cli.Main(newCommand()) }

func newCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "run-spec [flags] [CMD…]",
		Short: "Turn an image config on stdin into an OCI runtime spec on stdout",
		Args:  cobra.ArbitraryArgs,
	}
	w := register(c.Flags())
	c.RunE = func(c *cobra.Command, args []string) error {
		o, err := w.options(c.Flags(), args)
		if err != nil {
			return err
		}
		in, err := cli.Stdin(c.Context())
		if err != nil {
			return err
		}
		defer in.Close()
		img, err := runtime.ReadImage(in)
		if err != nil {
			return err
		}
		spec, err := runtime.Spec(img, *o)
		if err != nil {
			return err
		}
		enc := json.NewEncoder(c.OutOrStdout())
		enc.SetIndent("", "\t")
		enc.SetEscapeHTML(false)
		return enc.Encode(spec)
	}
	return c
}

// wishes are the flags that Options can't hold as they are.
type wishes struct {
	o                               runtime.Options
	entrypoint, memory              string
	env, envFiles, mounts, volumes  []string
	tmpfs, rlimits, devices, labels []string
	sysctls                         []string
}

func register(f *pflag.FlagSet) *wishes {
	w := &wishes{}
	f.SetInterspersed(false)
	f.StringArrayVar(&w.labels, "annotation", nil, "add the annotation `NAME=VALUE`")
	f.StringVar(&w.o.AppArmor, "apparmor", "", "confine by the AppArmor `PROFILE`, which is loaded")
	f.StringSliceVar(&w.o.CapAdd, "cap-add", nil, "add the `CAPABILITY`, or ALL")
	f.StringSliceVar(&w.o.CapDrop, "cap-drop", nil, "drop the `CAPABILITY`, or ALL")
	f.Float64Var(&w.o.CPUs, "cpus", 0, "limit to `N` processors' time, 1.5 for example")
	f.StringVar(&w.o.Cwd, "cwd", "", "the working `DIR` (default: the image's)")
	f.StringArrayVar(&w.devices, "device", nil, "give the host's device `SOURCE[:TARGET][:rwm]`")
	f.StringVar(&w.entrypoint, "entrypoint", "", "run `FILE` instead of the image's entrypoint and command; empty for neither")
	f.Lookup("entrypoint").Annotations = map[string][]string{cli.MayBeEmpty: nil}
	f.StringArrayVarP(&w.env, "env", "e", nil, "set `NAME=VALUE`; NAME alone takes this process's value, or removes the variable")
	f.StringArrayVar(&w.envFiles, "env-file", nil, "set the variables in `FILE`, one a line")
	f.StringVar(&w.o.Hostname, "hostname", "", "the host `NAME` in the container")
	f.StringArrayVar(&w.labels, "label", nil, "the same as --annotation `NAME=VALUE`")
	f.StringVar(&w.memory, "memory", "", "limit memory to `SIZE`, 512m for example")
	f.StringArrayVar(&w.mounts, "mount", nil, "mount `type=TYPE,src=SOURCE,dst=TARGET[,ro][,options=A:B]`")
	f.StringVar(&w.o.Network, "net", "none", "the network: host, none, or a namespace's `PATH`")
	f.BoolVar(&w.o.NoNewPrivileges, "no-new-privs", false, "keep setuid programs from gaining privileges")
	f.Int64Var(&w.o.Pids, "pids", 0, "limit to `N` processes and threads")
	f.BoolVar(&w.o.Privileged, "privileged", false, "every capability and device, nothing masked; no seccomp filter unless --seccomp")
	f.BoolVar(&w.o.ReadOnly, "read-only", false, "mount the root filesystem read-only")
	f.StringArrayVar(&w.rlimits, "rlimit", nil, "set the limit `NAME=SOFT[:HARD]`, nofile=1024 for example")
	f.StringVar(&w.o.Rootfs, "rootfs", "", "the container's root filesystem `DIR`, where users are looked up (default \"rootfs\" in the bundle, users by number)")
	f.StringVar(&w.o.Seccomp, "seccomp", "", "filter system calls by the `PROFILE` in a file; unconfined for no filter (default docker's: default)")
	f.StringVar(&w.o.SELinuxLabel, "selinux-label", "", "the SELinux `LABEL` of the process")
	f.StringVar(&w.o.SELinuxMountLabel, "selinux-mount-label", "", "the SELinux `LABEL` of the mounts that the runtime makes")
	f.StringArrayVar(&w.sysctls, "sysctl", nil, "set the namespaced sysctl `NAME=VALUE`")
	f.BoolVarP(&w.o.Terminal, "terminal", "t", false, "give the process a terminal")
	f.StringArrayVar(&w.tmpfs, "tmpfs", nil, "mount a tmpfs on `TARGET[:OPTION,…]`")
	f.StringVarP(&w.o.User, "user", "u", "", "run as `USER[:GROUP]`, names or numbers (default: the image's)")
	f.StringArrayVarP(&w.volumes, "volume", "v", nil, "mount the host's `SOURCE:TARGET[:OPTION,…]`")
	return w
}

func (w *wishes) options(f *pflag.FlagSet, args []string) (*runtime.Options, error) {
	o := &w.o
	o.Args, o.Host = args, runtime.ThisHost()
	if f.Changed("entrypoint") {
		o.Entrypoint = new([]string)
		if w.entrypoint != "" {
			*o.Entrypoint = []string{w.entrypoint}
		}
	}
	if o.CPUs < 0 || o.CPUs > 1<<20 || o.CPUs != o.CPUs || o.Pids < 0 {
		return nil, cli.Usagef("--cpus and --pids want a positive number")
	}
	if w.memory != "" {
		var err error
		if o.Memory, err = runtime.ParseSize(w.memory); err != nil {
			return nil, fmt.Errorf("--memory: %w", err)
		}
	}
	for _, name := range w.envFiles {
		file, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("--env-file: %w", err)
		}
		env, err := runtime.ReadEnv(file)
		file.Close()
		if err != nil {
			return nil, fmt.Errorf("--env-file %s: %w", name, err)
		}
		o.Env = append(o.Env, env...)
	}
	for _, v := range w.env {
		o.Env = append(o.Env, runtime.ParseEnv(v))
	}
	for _, list := range []struct {
		values []string
		parse  func(string) (specs.Mount, error)
	}{{w.mounts, runtime.ParseMount}, {w.volumes, runtime.ParseVolume}, {w.tmpfs, runtime.ParseTmpfs}} {
		for _, v := range list.values {
			m, err := list.parse(v)
			if err != nil {
				return nil, err
			}
			o.Mounts = append(o.Mounts, m)
		}
	}
	for _, v := range w.rlimits {
		r, err := runtime.ParseRlimit(v)
		if err != nil {
			return nil, err
		}
		o.Rlimits = append(o.Rlimits, r)
	}
	if o.Privileged {
		var err error
		if o.Devices, err = runtime.HostDevices(); err != nil {
			return nil, err
		}
	}
	for _, v := range w.devices {
		d, err := runtime.ParseDevice(v)
		if err != nil {
			return nil, err
		}
		o.Devices = append(o.Devices, d)
	}
	o.Annotations, o.Sysctls = map[string]string{}, map[string]string{}
	for _, v := range w.labels {
		name, value, _ := strings.Cut(v, "=")
		if name == "" {
			return nil, cli.Usagef("annotation %q is not NAME=VALUE", v)
		}
		o.Annotations[name] = value
	}
	for _, v := range w.sysctls {
		name, value, ok := strings.Cut(v, "=")
		if !ok {
			return nil, cli.Usagef("sysctl %q is not NAME=VALUE", v)
		}
		o.Sysctls[name] = value
	}
	return o, nil
}
