package spec

import (
	"regexp"
	"slices"
	"strings"
)

// defaultSysctls are docker's, for a container that does not use the host's network: any user may listen on any port
// and send ICMP echo requests.
var defaultSysctls = map[string]string{
	"net.ipv4.ip_unprivileged_port_start": "0",
	pingGroupRange:                        "0 2147483647",
}

// pingGroupRange has a range of groups that a user namespace does not map completely.
const pingGroupRange = "net.ipv4.ping_group_range"

// ipcSysctls are the sysctls of an IPC namespace (runtime-spec, and moby's ValidateSysctl).
var ipcSysctls = []string{
	"kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax", "kernel.shmmni", "kernel.shm_rmid_forced",
}

var sysctlName = regexp.MustCompile(`^[A-Za-z0-9_-]+([.][A-Za-z0-9_:-]+)+$`)

// sysctls returns the default sysctls and the caller's. A sysctl that does not belong to one of the container's own
// namespaces would change the host, and is InvalidArgument.
func (o *Options) sysctls() (map[string]string, error) {
	all := map[string]string{}
	network := Sharing(o.Network)
	if !o.hostNetwork() && network.Container() == "" { // another container's network has its own already
		for _, name := range o.Host.Sysctls {
			if o.UserNS.Own() && !network.own() {
				break // a joined network must not be changed
			}
			if name != pingGroupRange || !o.Host.UserNamespace && !o.UserNS.Own() {
				all[name] = defaultSysctls[name]
			}
		}
	}
	for name, value := range o.Sysctls {
		if err := CheckText("sysctl "+name, value); err != nil {
			return nil, err
		}
		switch {
		case !sysctlName.MatchString(name):
			return nil, invalid("sysctl %q is not a name such as net.ipv4.ip_forward", name)
		case strings.HasPrefix(name, "net.") && o.hostNetwork():
			return nil, invalid("sysctl %s: the network is the host's", name)
		case strings.HasPrefix(name, "net.") && network.Container() != "":
			return nil, invalid("sysctl %s: the network is that of container %s", name, network.Container())
		case !strings.HasPrefix(name, "net.") && (o.IPC.isHost("ipc") || o.IPC.Container() != ""):
			return nil, invalid("sysctl %s: the IPC namespace is %s", name, o.IPC)
		case !strings.HasPrefix(name, "net.") && !strings.HasPrefix(name, "fs.mqueue.") && !slices.Contains(ipcSysctls, name):
			return nil, invalid("sysctl %s is the host's, not the container's", name)
		}
		all[name] = value
	}
	return all, nil
}
