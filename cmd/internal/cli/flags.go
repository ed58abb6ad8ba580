package cli

import (
	"os"

	"github.com/spf13/pflag"
)

// Root registers --root, the store's directory: the flag, or $DIST_ROOT, or ./.content.
func Root(f *pflag.FlagSet) *string {
	return envString(f, "root", "DIST_ROOT", ".content", "the store's `DIR`")
}

// Namespace registers --namespace, for names and containers: the flag, or $CONTAINERD_NAMESPACE, or default.
func Namespace(f *pflag.FlagSet) *string {
	return envString(f, "namespace", "CONTAINERD_NAMESPACE", "default", "the `NAMESPACE` of names")
}

// envString registers a string flag whose default comes from an environment variable. Help shows the built-in default.
func envString(f *pflag.FlagSet, name, env, value, usage string) *string {
	p := f.String(name, value, usage+" (env "+env+")")
	if v := os.Getenv(env); v != "" {
		*p = v
	}
	return p
}
